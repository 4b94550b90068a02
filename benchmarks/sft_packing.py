"""Answered tokens per second: packed rows against padding to the longest chat of a batch, same model, same chats, same number of chats a step, in one run.

    python benchmarks/sft_packing.py --model runs/mini/pretrained --chats chats.json [--block 512] [--steps 12] [--json out.json]

The padded way is what a plain `Trainer` does: chats in random order, right padding, an attention mask, logits of every position. The packed way is `llama_zh_nb.sft`'s:
best-fit rows, positions that restart, logits of the learnt positions alone. Both see the same chats; the mean loss per answered token is compared too.
"""
import argparse, json, platform, time

def batches(items, size): return [items[i:i+size] for i in range(0, len(items) - size + 1, size)]

def run(model, steps, loss_of, repeats):
    "Seconds of one forward and backward pass over all `steps`, best of `repeats`; summed loss; learnt tokens."
    best = None
    for _ in range(repeats):
        t, total, n = time.perf_counter(), 0., 0
        for s in steps:
            loss, k = loss_of(model, s)
            loss.backward(); model.zero_grad(set_to_none=True)
            total += loss.item(); n += k
        best = min(best or 1e9, time.perf_counter() - t)
    return best, total/n, n

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', required=True); p.add_argument('--chats', nargs='+', required=True); p.add_argument('--template', default='alpaca2')
    p.add_argument('--block', type=int, default=512); p.add_argument('--batch', type=int, default=8); p.add_argument('--steps', type=int, default=12)
    p.add_argument('--repeats', type=int, default=2); p.add_argument('--threads', type=int, default=2); p.add_argument('--device', default='cpu'); p.add_argument('--json')
    a = p.parse_args()
    import random, torch
    from torch.nn.functional import cross_entropy, pad
    from llama_zh_nb.lora import load_base, load_tokenizer
    from llama_zh_nb.sft import examples, Packed, ChatCollate, Examples, pad_id, read_chats, _learn_forward
    torch.set_num_threads(a.threads)
    tok, model = load_tokenizer(a.model), load_base(a.model, 'full', a.device)
    _learn_forward(model)
    data = examples(read_chats(a.chats), tok, a.template, block=a.block)
    items = random.Random(0).sample(data.items, min(len(data.items), a.steps*a.batch))
    collate, dev = ChatCollate(pad_id(tok)), lambda b: {k: v.to(a.device) for k, v in b.items()}

    def padded(m, chats):
        b = dev(collate([dict(parts=[e], row=i) for i, e in enumerate(chats)]))
        mask = torch.tensor([[1]*len(e.ids) + [0]*(b['input_ids'].shape[1] - len(e.ids)) for e in chats], device=a.device)
        y = b['labels'][:, 1:]
        return cross_entropy(m(input_ids=b['input_ids'], attention_mask=mask).logits[:, :-1].flatten(0, 1).float(), y.flatten(), reduction='sum'), int((y != -100).sum())

    def packed(m, rows):
        b = dev(collate(rows))
        y = b['labels'][:, 1:]
        learn = pad(y != -100, (0, 1))
        return cross_entropy(m(input_ids=b['input_ids'], position_ids=b['position_ids'], learn=learn).float(), y[learn[:, :-1]], reduction='sum'), int(learn.sum())

    pk = Packed(Examples(items, {}), a.block)
    rows, per = [pk[i] for i in range(len(pk))], max(1, round(len(pk)/(len(items)/a.batch)))
    plans = {'padded to the longest': (batches(items, a.batch), padded), 'packed': ([rows[i:i+per] for i in range(0, len(rows), per)], packed)}
    out, width = {}, {'padded to the longest': sum(max(len(e.ids) for e in b)*len(b) for b in plans['padded to the longest'][0]), 'packed': len(rows)*a.block}
    for name, (steps, f) in plans.items():
        secs, loss, n = run(model, steps, f, a.repeats)
        out[name] = dict(seconds=round(secs, 3), answered_tokens=n, answered_tokens_per_second=round(n/secs, 1), positions=width[name], loss=round(loss, 5))
    base, ours = out.values()
    out |= dict(ratio=round(ours['answered_tokens_per_second']/base['answered_tokens_per_second'], 2), chats=len(items), block=a.block, batch=a.batch, threads=a.threads, torch=torch.__version__, machine=platform.machine())
    for k in plans: print(f"{k:24}" + '  '.join(f'{n} {v:,}' for n, v in out[k].items()))
    print(f"ratio {out['ratio']}; loss differs by {abs(ours['loss'] - base['loss']):.1e}")
    if a.json: open(a.json, 'w').write(json.dumps(out, indent=1))

if __name__ == '__main__': main()
