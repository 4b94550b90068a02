"Small texts, and stand-ins for a model, a server and a file, for the tests of documents."

import http.server
import json
import threading
from contextlib import contextmanager

import pytest
from helpers.pieces import train_bpe
from langchain_core.language_models.chat_models import SimpleChatModel

from llama_zh_nb.core.settings import RagArgs
from llama_zh_nb.documents.chat_model import load_chat
from llama_zh_nb.documents.index import build_index
from llama_zh_nb.documents.load import Document
from llama_zh_nb.documents.recall import eval_retrieval

TOWN = """# 青石镇

## 茶馆
镇口的茶馆开了六十年。掌柜姓罗，人人叫他“罗三爷”。有人问：“今天的茶怎么淡了？”他说：“水大了，人就长寿！”

## 码头
码头在镇子东头，每天早上七点有船去县城，票价五元。末班船下午四点开。

| 船名 | 开船 |
|---|---|
| 青鱼号 | 七点 |
| 白鹭号 | 九点 |
"""


POEMS = {
    '山.md': '# 山\n黄山在安徽，云海有名。',
    '水.md': '# 水\n西湖在杭州，湖上有白堤。',
    '饭.md': '# 饭\n羊肉泡馍是西安的小吃。',
    '茶.md': '# 茶\n龙井茶产在杭州西湖边。',
}


DOCS = {
    '码头': '码头在镇子东头，早班船七点去县城，票价五元。',
    '茶馆': '茶馆开了六十年，掌柜姓罗。早上六点开门。',
    '学校': '学校有三百个学生，早上八点上课。',
}


def pdf(pages):
    "A PDF whose pages hold lines of any text: a font without outlines, whose letters are named by a ToUnicode table"
    chars = sorted({c for p in pages for line in p for c in line})
    code = {c: i + 1 for i, c in enumerate(chars)}
    cmap = (
        'begincmap 1 begincodespacerange <0000> <FFFF> endcodespacerange '
        + f'{len(chars)} beginbfchar '
        + ' '.join(f'<{code[c]:04X}> <{c.encode("utf-16-be").hex()}>' for c in chars)
        + ' endbfchar endcmap'
    )

    def stream(s):
        return f'<</Length {len(s)}>>\nstream\n{s}\nendstream'

    objs = [
        '<</Type/Catalog/Pages 2 0 R>>',
        f'<</Type/Pages/Count {len(pages)}/Kids[{" ".join(f"{6 + 2 * i} 0 R" for i in range(len(pages)))}]>>',
        '<</Type/Font/Subtype/Type0/BaseFont/X/Encoding/Identity-H/DescendantFonts[4 0 R]/ToUnicode 5 0 R>>',
        '<</Type/Font/Subtype/CIDFontType2/BaseFont/X/CIDSystemInfo<</Registry(Adobe)/Ordering(Identity)/Supplement 0>>/DW 1000>>',
        stream(cmap),
    ]
    for i, lines in enumerate(pages):
        body = (
            'BT /F1 12 Tf 72 720 Td 14 TL '
            + ' '.join(f'<{"".join(f"{code[c]:04X}" for c in line)}> Tj T*' for line in lines)
            + ' ET'
        )
        objs += [
            f'<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>/Contents {7 + 2 * i} 0 R>>',
            stream(body),
        ]
    out, at = '%PDF-1.4\n', []
    for n, o in enumerate(objs, 1):
        at.append(len(out))
        out += f'{n} 0 obj\n{o}\nendobj\n'
    return (
        out
        + f'xref\n0 {len(objs) + 1}\n0000000000 65535 f \n'
        + ''.join(f'{a:010} 00000 n \n' for a in at)
        + f'trailer<</Size {len(objs) + 1}/Root 1 0 R>>\nstartxref\n{len(out)}\n%%EOF'
    ).encode()


def write(d, n, start=0, text='第{i}号船每天{i}点开，票价{i}元。'):
    d.mkdir(exist_ok=True)
    for i in range(start, start + n):
        (d / f'{i:03}.txt').write_text(text.format(i=i), encoding='utf-8')


def same(a, b):
    return [(x.page_content, x.metadata) for x in a.chunks] == [
        (x.page_content, x.metadata) for x in b.chunks
    ] and all((a.lexicon.scores(q) == b.lexicon.scores(q)).all() for q in ('第7号船', '新的一句'))


def squad(path):
    paras = [
        p for x in json.loads(path.read_text(encoding='utf-8'))['data'] for p in x['paragraphs']
    ]
    docs = [Document(p['context'], metadata={'source': f'p{i}'}) for i, p in enumerate(paras)]
    return docs, [
        {'question': q['question'], 'source': f'p{i}'}
        for i, p in enumerate(paras)
        for q in p['qas']
    ]


def drcd(shared, tmp_path, paragraphs):
    "Retrieval with DRCD's traditional questions, and with the same ones in simplified characters"
    import opencc

    simple = opencc.OpenCC('t2s')
    paras = [
        p
        for x in json.loads((shared / 'data/eval/drcd/DRCD_dev.json').read_text(encoding='utf-8'))[
            'data'
        ]
        for p in x['paragraphs']
    ][:paragraphs]
    ix = build_index(
        [Document(p['context'], metadata={'source': f'p{i}'}) for i, p in enumerate(paras)],
        tmp_path / 'i',
        args=RagArgs(embedding='none'),
    )
    qs = [
        {'question': q['question'], 'source': f'p{i}'}
        for i, p in enumerate(paras)
        for q in p['qas']
    ]
    own, other = (
        eval_retrieval(ix, qs, 10),
        eval_retrieval(ix, [{**q, 'question': simple.convert(q['question'])} for q in qs], 10),
    )
    print(own, other)
    assert other.recall(1) >= own.recall(1) - 0.02 and own.recall(5) > 0.98
    return own


def bert(folder, labels=None):
    "A tiny random BERT, as a plain model or as a cross-encoder"
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    folder.mkdir()
    (folder / 'vocab.txt').write_text(
        '\n'.join(
            [
                '[PAD]',
                '[UNK]',
                '[CLS]',
                '[SEP]',
                '[MASK]',
                *sorted({c for t in POEMS.values() for c in t if not c.isspace()}),
            ]
        ),
        encoding='utf-8',
    )
    BertTokenizerFast(str(folder / 'vocab.txt')).save_pretrained(folder)
    config = BertConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        **({'num_labels': labels} if labels else {}),
    )
    (BertForSequenceClassification if labels else BertModel)(config).save_pretrained(folder)
    return folder


class Heard(SimpleChatModel):
    "Says what `reply` makes of the message, and remembers it"

    reply: object
    heard: list = []

    @property
    def _llm_type(self):
        return 'heard'

    def _call(self, messages, stop=None, run_manager=None, **kw):
        self.heard.append(messages[-1].content)
        return self.reply(messages[-1].content)


def heard(reply):
    return Heard(reply=reply, heard=[])


@contextmanager
def fake_server(answer, models=('m',), status=200):
    "A tiny OpenAI-compatible server; `asked` holds what it was asked"
    asked = []

    class H(http.server.BaseHTTPRequestHandler):
        def log_message(self, *a):
            pass

        def send(self, body, kind='application/json', code=None):
            self.send_response(code or status)
            self.send_header('content-type', kind)
            self.send_header('content-length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.send(
                json.dumps(
                    {'object': 'list', 'data': [{'id': m, 'object': 'model'} for m in models]}
                ).encode(),
                code=200,
            )

        def do_POST(self):
            req = json.loads(self.rfile.read(int(self.headers['content-length'])))
            asked.append({**req, 'path': self.path, 'key': self.headers.get('authorization')})
            if status != 200:
                return self.send(b'{"error": {"message": "no"}}')
            text, base = (
                answer(req['messages'][-1]['content']),
                dict(id='1', created=0, model=req['model']),
            )
            if not req.get('stream'):
                return self.send(
                    json.dumps(
                        {
                            **base,
                            'object': 'chat.completion',
                            'choices': [
                                dict(
                                    index=0,
                                    finish_reason='stop',
                                    message=dict(role='assistant', content=text),
                                )
                            ],
                        }
                    ).encode()
                )
            ev = [
                {
                    **base,
                    'object': 'chat.completion.chunk',
                    'choices': [dict(index=0, delta=dict(content=c), finish_reason=None)],
                }
                for c in text
            ] + [
                {
                    **base,
                    'object': 'chat.completion.chunk',
                    'choices': [dict(index=0, delta={}, finish_reason='stop')],
                }
            ]
            self.send(
                ''.join(f'data: {json.dumps(e)}\n\n' for e in ev).encode() + b'data: [DONE]\n\n',
                'text/event-stream',
            )
            return None

    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), H)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{s.server_port}', asked
    finally:
        s.shutdown()
        s.server_close()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A tiny random Llama with an exact tokenizer, as this project saves it. Rows of byte pieces are zero, so it writes whole characters."
    import sentencepiece as spm
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_zh_nb.tokenizer.exact import save_tokenizer

    d = tmp_path_factory.mktemp('model')
    text = (TOWN + '问答之间，山高水长。The boat leaves at nine.\n') * 20
    more = dict(allow_whitespace_only_pieces=True, pad_id=3, hard_vocab_limit=False)
    train_bpe(d / 'm', text.splitlines(), 420, character_coverage=1.0, **more)
    save_tokenizer(d / 'm.model', d / 'hf')
    torch.manual_seed(0)
    m = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=448,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    n = spm.SentencePieceProcessor(model_file=str(d / 'm.model')).vocab_size()
    m.lm_head.weight.data[:264] = 0
    m.lm_head.weight.data[n:] = 0
    m.save_pretrained(d / 'hf')
    return d / 'hf'


@pytest.fixture(scope='module')
def llm(folder):
    return load_chat(folder, device='cpu', max_new_tokens=12)


@pytest.fixture(scope='module')
def town(tmp_path_factory):
    d = tmp_path_factory.mktemp('town')
    (d / 'docs').mkdir()
    (d / 'docs' / '青石镇.md').write_text(TOWN, encoding='utf-8')
    build_index(d / 'docs', d / 'index', args=RagArgs(chunk_tokens=80))
    return d


@pytest.fixture(scope='module')
def poems(tmp_path_factory):
    d = tmp_path_factory.mktemp('poems')
    (d / 'docs').mkdir()
    for n, t in POEMS.items():
        (d / 'docs' / n).write_text(t, encoding='utf-8')
    build_index(d / 'docs', d / 'ix')
    return d


@pytest.fixture(scope='module')
def index(tmp_path_factory):
    d = tmp_path_factory.mktemp('answers')
    build_index(
        [Document(f'{n}。{t}', metadata={'source': n}) for n, t in DOCS.items()],
        d / 'index',
        args=RagArgs(chunk_tokens=64),
    )
    return d / 'index'
