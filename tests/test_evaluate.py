"evaluate: the fast way equals the slow way, files of the real benchmarks are read, a killed run goes on, leaks are found, wrong input is one message"

import json
import math
from pathlib import Path

import pytest

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.evals import choice as ev
from llama_zh_nb.evals.bits import compare_bits
from llama_zh_nb.evals.choice import evaluate, fill_text, letter_ids, prompt_text
from llama_zh_nb.evals.contamination import contamination, units
from llama_zh_nb.evals.longbench import (
    class_score,
    f1,
    longbench,
    middle_cut,
    read_long,
    retrieval_score,
    rouge_l,
)
from llama_zh_nb.evals.measure import bits
from llama_zh_nb.evals.tasks import (
    HUB,
    LETTERS,
    Question,
    Task,
    parse_row,
    read_task,
    subject_table,
    world_task,
    write_task,
)
from llama_zh_nb.evaluate import compare_page, evaluate_command, forgetting, lines_of

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def tiny():
    "A random model with a byte tokenizer: every letter is one piece, without a space before it"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    t = Tokenizer(
        models.BPE(
            vocab={
                c: i
                for i, c in enumerate(['<s>', '</s>', *sorted(pre_tokenizers.ByteLevel.alphabet())])
            },
            merges=[],
        )
    )
    t.pre_tokenizer, t.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>')
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.3,
        )
    ).eval(), tok


def made(n=7, k=3, options=4, style='ceval'):
    q = lambda s, i: Question(
        f'{s}-{i}',
        s,
        f'{s}第{i}题' + '呀' * (i * 5 % 7) + ('____。' if i % 2 else '？'),
        tuple(f'{"甲乙丙丁戊"[j]}{"x" * ((i + j) % 3)}' for j in range(options - (i % 2))),
        i % (options - 1),
    )
    return Task(
        'made',
        {s: [q(s, i) for i in range(n)] for s in ('law', 'logic')},
        {s: [q(s, 100 + i) for i in range(k)] for s in ('law', 'logic')},
        {'law': '法学', 'logic': '逻辑'},
        {'law': ['A'], 'logic': ['A', 'B']},
        style,
    )


@torch.no_grad()
def plain(model, tok, text):
    "One prompt, one forward, no cache"
    ids = [tok.bos_token_id] + tok(text, add_special_tokens=False)['input_ids']
    return ids, model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize('shots,budget', [(0, 16_384), (2, 16_384), (2, 600), (3, 1)])
def test_letters_equal_one_prompt_at_a_time(tiny, shots, budget):
    task = made()
    r = evaluate(tiny, task, shots=shots, budget=budget)
    assert [x['id'] for x in r.rows] == [q.id for v in task.subjects.values() for q in v]
    assert not r.settings['cut'] and {x['shots'] for x in r.rows} == {shots}
    for x in r.rows:
        _, lp = plain(*tiny, r.heads[x['subject']] + x['prompt'])
        want = [lp[-1, i].item() for i in letter_ids(tiny[1], len(x['options']))[0]]
        assert max(abs(a - b) for a, b in zip(want, x['scores'])) < 1e-4 and len(want) == len(
            x['scores']
        )
        assert x['choice'] == LETTERS[max(range(len(want)), key=want.__getitem__)] and x[
            'right'
        ] == (x['choice'] == x['answer'])


@pytest.mark.parametrize('shots,budget', [(0, 16_384), (2, 900)])
def test_options_equal_one_text_at_a_time(tiny, shots, budget):
    task = made(5)
    r = evaluate(tiny, task, shots=shots, by='text', budget=budget)
    qs = {q.id: q for v in task.subjects.values() for q in v}
    for x in r.rows:
        q, want = qs[x['id']], []
        whole = [plain(*tiny, r.heads[x['subject']] + fill_text(task, q, o)) for o in q.options]
        start = ev.common([i for i, _ in whole])
        for (ids, lp), o in zip(whole, q.options):
            want.append(
                sum(
                    lp[j - 1, ids[j]].item()
                    for j in range(min(start, min(len(i) for i, _ in whole) - 1), len(ids))
                )
                / len(o)
            )
        assert max(abs(a - b) for a, b in zip(want, x['scores'])) < 1e-4


def test_both_spellings_are_added():
    sp = pytest.importorskip('llama_zh_nb.weights')
    import tempfile

    from llama_zh_nb.checkpoint.folder import load

    with tempfile.TemporaryDirectory() as d:
        model, tok = load(sp.acquire('mini', Path(d) / 'base'), 'cpu')
    assert [tok.convert_ids_to_tokens(r) for r in letter_ids(tok)] == [
        list('ABCD'),
        ['▁A', '▁B', '▁C', '▁D'],
    ]
    t = world_task('zh').only('river')
    both, bare, space = (
        evaluate((model, tok), t, spelling=s, limit=3).rows for s in ('both', 'bare', 'space')
    )
    for a, b, c in zip(both, bare, space):
        for x, y, z in zip(a['scores'], b['scores'], c['scores']):
            assert abs(math.exp(x) - math.exp(y) - math.exp(z)) < 1e-4


def test_too_long_prompts_lose_examples_then_their_middle(tiny):
    task = made(4)
    r = evaluate(tiny, task, shots=3, max_len=340)
    assert (
        {x['shots'] for x in r.rows} & {1, 2}
        and 3 not in {x['shots'] for x in r.rows}
        and r.settings['fewer'] == len(r.rows)
        and not r.settings['cut']
    )
    r = evaluate(tiny, task, max_len=60)
    assert r.settings['cut'] == len(r.rows) and all(
        len(x['scores']) == len(x['options']) for x in r.rows
    )
    assert 'lost their middle' in r._repr_html_()


def test_a_killed_run_goes_on(tiny, tmp_path, monkeypatch):
    task, real, asked = made(), ev._choose, []

    def dies(model, task, qs, ids, *a):
        for k, x in enumerate(real(model, task, qs, ids, *a)):
            if qs[0].subject == 'logic' and k == 2:
                raise KeyboardInterrupt
            asked.append(qs[x[0]].id)
            yield x

    whole = evaluate(tiny, task, name='m')
    monkeypatch.setattr(ev, '_choose', dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny, task, out=tmp_path, name='m')
    assert len(asked) == 9 and not list(tmp_path.glob('*[0-9a-f].json'))
    with open(next(tmp_path.glob('*.rows.jsonl')), 'a') as f:
        f.write('{"id": "torn')
    again = []
    monkeypatch.setattr(
        ev,
        '_choose',
        lambda model, task, qs, *a: (
            again.append(qs[x[0]].id) or x for x in real(model, task, qs, *a)
        ),
    )
    r = evaluate(tiny, task, out=tmp_path, name='m')
    assert not set(again) & set(asked) and len(again) + len(asked) == 14
    assert [(x['id'], x['choice']) for x in r.rows] == [(x['id'], x['choice']) for x in whole.rows]
    again.clear()
    assert (
        evaluate(tiny, task, out=tmp_path, name='m').to_dict() == r.to_dict() and not again
    )  # finished: read back
    evaluate(tiny, task, out=tmp_path, name='m', shots=1)
    assert (
        len(again) == 14 and len(list(tmp_path.glob('*.json'))) == 2
    )  # other settings, other file


def test_the_result_keeps_its_evidence_and_names_its_means(tiny, tmp_path):
    r = evaluate(tiny, made(), shots=1, out=tmp_path, name='m')
    d = json.loads(next(tmp_path.glob('*.json')).read_text())
    assert (
        d['settings']['extraction']
        and d['settings']['spelling'] == [list('ABCD')]
        and d['rows'][0]['prompt']
        and d['heads']['law'].startswith('以下是中国关于法学考试的单项选择题')
    )
    assert (
        set(d['subjects']) == {'law', 'logic'}
        and set(d['groups']) == {'A', 'B'}
        and d['groups']['A']['n'] == 14
    )
    assert (
        d['micro']['lo'] <= d['micro']['share'] <= d['micro']['hi']
        and 'macro' in repr(r)
        and 'micro' in repr(r)
    )


WRONG = [
    (dict(shots=-1), 'shots'),
    (dict(limit=0), 'limit'),
    (dict(form='x'), 'form'),
    (dict(by='x'), 'by'),
    (dict(shots=9), '9 examples'),
    (dict(spelling='x'), 'spelling'),
    (dict(spelling='space'), 'single pieces'),
    (dict(max_len=3), 'max_len'),
]


@pytest.mark.parametrize('kw,message', WRONG)
def test_wrong_settings(tiny, kw, message):
    with pytest.raises(LlamaZhError, match=message):
        evaluate(tiny, made(), **kw)


def test_a_file_in_the_place_of_the_results(tiny, tmp_path):
    (tmp_path / 'out').write_text('x')
    with pytest.raises(LlamaZhError, match='cannot make the folder'):
        evaluate(tiny, made(), out=tmp_path / 'out')


def test_nan_is_refused(tiny):
    import copy

    m = copy.deepcopy(tiny[0])
    m.lm_head.weight.data[3] = float('nan')
    with pytest.raises(LlamaZhError, match='NaN'):
        evaluate((m, tiny[1]), made())


# ---- tasks


def test_real_benchmarks_are_read_whole(shared):
    d = shared / 'data' / 'eval'
    t = read_task(d / 'ceval')
    assert (len(t), len(t.subjects), t.style, t.dropped) == (685, 26, 'ceval', {}) and all(
        len(t.shots[s]) == 5 for s in t.subjects
    )
    assert (
        t.intro('marxism')
        == '以下是中国关于马克思主义基本原理考试的单项选择题，请选出其中的正确答案。\n\n'
        and t.groups['marxism'] == ['Social Science']
    )
    assert len(read_task(d / 'ceval', 'dev')) == 260
    c = read_task(d / 'cmmlu', 'dev')
    assert (len(c), len(c.subjects), c.style) == (
        335,
        67,
        'cmmlu',
    ) and 'China specific' in c.groups['chinese_history']
    with pytest.raises(LlamaZhError, match='no folder val or test'):
        read_task(d / 'cmmlu')
    a = read_task(d / 'agieval')
    assert {s: len(v) for s, v in a.subjects.items()} == {
        'gaokao-chinese': 246,
        'gaokao-english': 306,
        'gaokao-history': 235,
    } and not a.dropped
    assert (
        read_task(d / 'agieval' / 'gaokao-english.jsonl').style == 'agieval_en'
        and read_task(d / 'agieval' / 'gaokao-history.jsonl').style == 'agieval_zh'
    )
    h = read_task(d / 'agieval' / 'gaokao-history.jsonl')
    tail = prompt_text(h, h.subjects['gaokao-history'][0])[1]
    assert (
        tail.startswith('问题：')
        and tail.endswith('\n答案：从A到D, 我们应选择')
        and ' 选项：(A)' in tail
    )
    m = read_task(d / 'c3' / 'c3-m-dev.json')
    g = read_task(d / 'c3' / 'c3-d-dev.json')
    assert (
        (len(m), len(g)) == (1991, 1825)
        and {len(q.options) for v in m.subjects.values() for q in v} == {2, 3, 4}
        and '\n' in g.subjects['c3-d-dev'][0].passage
    )
    for t in (c, a, m):
        assert all(
            q.passage + q.question and 0 <= q.answer < len(q.options)
            for v in t.subjects.values()
            for q in v
        )


def test_ceval_on_a_real_model_agrees_with_a_plain_forward(shared):
    from llama_zh_nb.checkpoint.folder import load

    model, tok = load(shared / 'data' / 'models' / 'stories260K_hf', 'cpu')
    t = read_task(shared / 'data' / 'eval' / 'ceval')
    for shots, form in ((0, 'base'), (5, 'base'), (0, 'chat')):
        r = evaluate(
            (model, tok),
            t.only('marxism', 'middle_school_history'),
            shots=shots,
            form=form,
            limit=2,
            spelling='bare',
        )
        for x in r.rows:
            if x['cut'] or form == 'chat' or x['shots'] < shots:
                continue
            text = r.heads[x['subject']] + x['prompt']
            ids = [tok.bos_token_id] + tok(
                text, add_special_tokens=False, split_special_tokens=True
            )['input_ids']
            with torch.no_grad():
                lp = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert (
                max(
                    abs(lp[i].item() - s)
                    for i, s in zip(letter_ids(tok, spelling='bare')[0], x['scores'])
                )
                < 1e-3
            )
        assert len(r.rows) == 4 and r.settings['chance'] == 0.25


def test_rows_in_every_spelling():
    want = Question('0', 's', '一加一', ('一', '二'), 1)
    for row in (
        {'question': '一加一', 'A': '一', 'B': '二', 'answer': 'B'},
        {'Question': ' 一加一 ', 'A': '一', 'B': '二', 'Answer': 'b'},
        {'question': '一加一', 'options': ['(A)一', '(B) 二'], 'label': 'B'},
        {'query': '一加一', 'choices': ['一', '二'], 'gold': [1]},
        {
            'question': '一加一',
            'choices': {'text': ['一', '二'], 'label': ['A', 'B']},
            'answer': '二',
        },
    ):
        assert parse_row(row, 's', '0') == want
    for row in (
        {'question': '', 'A': '1', 'B': '2', 'answer': 'A'},
        {'question': 'x', 'A': '1', 'answer': 'A'},
        {'question': 'x', 'A': '1', 'B': '2', 'answer': 'E'},
        {'question': 'x', 'A': '1', 'B': '2', 'answer': ''},
    ):
        assert isinstance(parse_row(row, 's', '0'), str)


def test_bad_rows_are_counted_and_a_test_split_without_answers_is_refused(tmp_path):
    (tmp_path / 'a.csv').write_text(
        'id,question,A,B,C,D,answer\n0,甲,1,2,3,4,A\n1,乙,1,2,3,4,\n2,丙,1,2,3,4,E\n'
    )
    assert (len(read_task(tmp_path / 'a.csv')), read_task(tmp_path / 'a.csv').dropped) == (
        1,
        {'no answer among the options': 2},
    )
    (tmp_path / 'b.csv').write_text('id,question,A,B,C,D\n0,甲,1,2,3,4\n')
    with pytest.raises(LlamaZhError, match='test split without answers'):
        read_task(tmp_path / 'b.csv')
    for name, text in (('c.csv', ''), ('d.json', '{}'), ('e.json', '[[1]]'), ('f.jsonl', '[1]\n')):
        (tmp_path / name).write_text(text)
        with pytest.raises(LlamaZhError):
            read_task(tmp_path / name)
    (tmp_path / 'g').mkdir()
    with pytest.raises(LlamaZhError):
        read_task(tmp_path / 'g')


def test_written_and_read_again(tmp_path):
    for t in (made(), made(options=5), world_task('en')):
        assert read_task(write_task(tmp_path / 't', t)).digest == t.digest


@pytest.mark.parametrize('name', [*HUB, 'nobody/nothing'])
def test_without_network_one_message_says_what_to_do(name):
    with pytest.raises(LlamaZhError, match='pass DIR instead of the name'):
        read_task(name)


def test_a_dataset_of_the_hub_reads_like_files(monkeypatch):
    datasets = pytest.importorskip('datasets')
    rows = {
        'dev': [
            dict(id=i, question=f'例{i}', A='1', B='2', C='3', D='4', answer='A', explanation='')
            for i in range(5)
        ],
        'val': [dict(id=0, question='题', A='1', B='2', C='3', D='4', answer='D', explanation='')],
    }
    monkeypatch.setattr(
        datasets,
        'load_dataset',
        lambda id, config, split: (
            rows[split] if id == 'ceval/ceval-exam' and config in subject_table('ceval') else 1 / 0
        ),
    )
    t = read_task('ceval', subjects=['law', 'logic'])
    assert (len(t), len(t.shots['law']), t.names['law'], t.style) == (2, 5, '法学', 'ceval')


# ---- bits, LongBench, contamination, comparison


def test_strided_bits_are_bounded_by_documents(tiny):
    a, b = '秋天的湖水很静。' * 4, 'The lake is calm. ' * 3
    one, two, both = (bits(*tiny, x, max_len=40, stride=9) for x in (a, b, [a, b]))
    assert (
        math.isclose(one.nats + two.nats, both.nats, rel_tol=1e-5)
        and both.chars == len(a) + len(b)
        and both.interval()
        and one.interval() is None
    )
    t = compare_bits({'x': tiny, 'y': tiny}, {'zh': [a, a], 'english': [b, b]})
    assert (
        t.difference('y', 'zh') == (0, 0, 0)
        and [r['unit'] for r in t.rows[:2]] == ['bpc', 'bpb']
        and '0.0%' in t._repr_html_()
    )


def test_longbench_metrics():
    assert f1('首都是巴黎', '巴黎') == pytest.approx(0.5) and f1('', '巴黎') == 0 == f1(
        '。', '巴黎'
    )
    assert (
        class_score('体育、娱乐', '体育', ['体育', '娱乐']) == 0.5
        and class_score('体育', '国际体育', ['体育', '国际体育']) == 0
    )
    assert (
        retrieval_score('答案是段落12', '段落12') == 1
        and retrieval_score('段落1', '段落12') == 0
        and retrieval_score('段落12或13', '段落12') == 0.5
    )


def test_rouge_agrees_with_the_package():
    rouge, jieba = pytest.importorskip('rouge_chinese'), pytest.importorskip('jieba')
    for a, t in (
        ('会议讨论了预算和人事', '会议讨论预算'),
        ('今天天气很好，我们去公园', '今天我们去了公园，公园里人很多很多'),
        ('好的好的', '好'),
    ):
        want = rouge.Rouge().get_scores([' '.join(jieba.cut(a))], [' '.join(jieba.cut(t))])[0][
            'rouge-l'
        ]['f']
        assert rouge_l(a, t, unique=False) == pytest.approx(want, abs=1e-6)


def test_longbench_rows_of_the_real_file(tiny, shared, tmp_path):
    rows = read_long(shared / 'data' / 'eval' / 'longbench' / 'multifieldqa_zh.jsonl')
    assert len(rows) == 200 and {r['dataset'] for r in rows} == {'multifieldqa_zh'}
    text, cut = middle_cut(tiny[1], rows[0]['context'], 90)
    assert (
        cut and text.startswith(rows[0]['context'][:10]) and text.endswith(rows[0]['context'][-10:])
    )
    short = [dict(r, longest=4) for r in rows[:3]]
    r = longbench(tiny, short, max_len=300, form='chat', out=tmp_path, name='m')
    assert (
        len(r.rows) == 3
        and r.settings['cut'] == 3
        and all(x['tokens'] <= 296 for x in r.rows)
        and 0 <= r.micro['share'] <= 1
    )
    assert r.micro['hi'] > r.micro['lo']  # three zeros are no certainty
    assert (
        r.settings['prompts']['multifieldqa_zh'].startswith('阅读以下文字')
        and longbench(tiny, short, max_len=300, form='chat', out=tmp_path, name='m').to_dict()
        == r.to_dict()
    )
    assert longbench(
        tiny,
        [
            dict(
                dataset='x',
                input='问',
                context='文',
                answers=['x'],
                prompt='{context}{input}',
                metric='f1',
                longest=2,
            )
        ],
        form='base',
    ).rows[0]['tokens'] == 1 + len('文问'.encode())


def test_planted_leaks_of_a_real_benchmark_are_found(shared):
    t = read_task(shared / 'data' / 'eval' / 'ceval').only('marxism', 'physician')
    qs = [q for v in t.subjects.values() for q in v]
    long = [q for q in qs if len(units(q.question)) >= 20][:5]
    clean = contamination(t, ['春天来了，柳树发芽。' * 20, 'Nothing of it is here.'])
    assert not clean.found
    leaky = contamination(
        t, [f'题库（{i}）：{q.question.replace("，", " ")}选{q.answer}' for i, q in enumerate(long)]
    )
    assert (
        {q.id for q in long} <= leaky.found
        and leaky.count('clean') > 0
        and leaky.rows[0]['subject'] in t.subjects
    )
    r = ev.Result(
        dict(task=t.name, model='m', shots=0, form='base', by='letter'),
        [dict(id=q.id, subject=q.subject, right=q.id in leaky.found) for q in qs],
    )
    b = leaky.beside(r)
    assert b['found']['share'] == 1 and b['not found']['share'] == 0 and b['all']['n'] == len(qs)


def test_the_page(tiny):
    a, b = (evaluate(tiny, made(), shots=s, name=f'<{s}>') for s in (0, 0))
    b.settings['model'] = 'b&c'
    page = compare_page([a, b, compare_bits({'b&c': tiny}, {'zh': ['秋天的湖水', '很静']})])
    assert (
        '&lt;0&gt;' in page
        and '<0>' not in page
        and 'b&amp;c' in page
        and '28.2 / 36.0' in page
        and '–' in page
        and '瞎猜' in page
    )
    assert (
        compare_page(json.loads(json.dumps(lines_of([a, b]))), published=False).count('<svg') == 2
    )
    assert forgetting(a, b)['lost'] == 0


def test_the_command(tmp_path):
    from llama_zh_nb.weights import acquire

    base = acquire('mini', tmp_path / 'base')
    (tmp_path / 'text.txt').write_text('秋天的湖水很静。\n' * 5)
    write_task(tmp_path / 'mine', world_task('zh').only('river', 'animal'))
    c = evaluate_command(
        [base],
        tasks=[str(tmp_path / 'mine')],
        text=[str(tmp_path / 'text.txt')],
        out=str(tmp_path / 'out'),
        limit=1,
        shots=1,
        device='cpu',
    )
    assert [x['task'] for x in c.lines] == [
        'world-zh, 1-shot, base, by letter',
        'world-en, 0-shot, base, by text',
        'text, bits per character',
        'English sample, bits per byte',
    ]
    assert (
        'comparison' in (tmp_path / 'out' / 'comparison.html').read_text()
        or 'Evaluation' in (tmp_path / 'out' / 'comparison.html').read_text()
    )
    for kw, message in (
        (dict(tasks=['cevall']), 'no task'),
        (dict(text=['none.txt']), 'no such text'),
    ):
        with pytest.raises(LlamaZhError, match=message):
            evaluate_command([base], out=str(tmp_path / 'no'), **kw)
    assert not (tmp_path / 'no').exists()


@pytest.mark.slow
def test_lm_eval_finds_the_same_numbers(shared, tmp_path):
    pytest.importorskip('lm_eval')
    from llama_zh_nb.checkpoint.folder import load
    from llama_zh_nb.evals.harness import lm_eval_run, to_lm_eval
    from llama_zh_nb.weights import acquire

    model = load(acquire('mini', tmp_path / 'base'), 'cpu')
    t = read_task(shared / 'data' / 'eval' / 'ceval').only('middle_school_history', 'marxism')
    names = to_lm_eval(t, tmp_path / 'tasks')
    for shots in (0, 1):
        theirs, ours = (
            lm_eval_run(model, names, tmp_path / 'tasks', shots=shots, limit=8),
            evaluate(model, t, shots=shots, limit=8, spelling='bare'),
        )
        mine = {f'zh_nb_ceval_{x["subject"]}-{x["id"].rsplit("-", 1)[1]}': x for x in ours.rows}
        same = [
            (mine[x['id']], x)
            for x in theirs.rows
            if mine[x['id']]['shots'] == shots and not mine[x['id']]['cut']
        ]
        assert same and all(
            max(abs(a - b) for a, b in zip(x['scores'], y['scores'])) < 1e-3
            and x['choice'] == y['choice']
            for x, y in same
        )
    with pytest.raises(LlamaZhError, match='no task'):
        lm_eval_run(model, 'no_such_task')
