"""A model that writes what it is told, and the conversations and terminals around it."""

import io
from types import SimpleNamespace

from llama_zh_nb.chat import Chat
from llama_zh_nb.core.errors import need
from llama_zh_nb.generation.terminal import Terminal

TEXT = '答：龘𠮷é，👍🏽 ok。'


class Stub:
    "Stands for a model: writes given ids, one at a time, whatever it is asked"

    device = 'cpu'

    def __init__(self, tok, text=TEXT, cut=None, context=400):
        self.config, self.ids, self.prompts = (
            SimpleNamespace(max_position_embeddings=context),
            tok(text, add_special_tokens=False)['input_ids'][:cut],
            [],
        )

    def generate(self, input_ids, streamer, stopping_criteria, generation_config, **kw):
        self.prompts.append(input_ids[0].tolist())
        streamer.put(input_ids)
        for i in self.ids[: generation_config.max_new_tokens]:
            streamer.put(need('torch').tensor([i]))
            if stopping_criteria(input_ids, None).all():
                break
        streamer.end()


def stub(mini, **kw):
    return Chat(
        (Stub(mini[1], **kw), mini[1]), preset='greedy', template='alpaca2', max_new_tokens=64
    )


def users(*texts):
    return [dict(role=('user', 'assistant')[i % 2], content=c) for i, c in enumerate(texts)]


def terminal(chat, *lines):
    out, err, it = io.StringIO(), io.StringIO(), iter(lines)
    term = Terminal(chat, lambda: next(it, None), out, err)
    term.run()
    return out.getvalue(), err.getvalue(), term
