"""The server: OpenAI's client and the older ones are answered, many at once, and nothing that is sent brings it down."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.answers import N, chat_folder, known_answers, user

from llama_zh_nb.checkpoint.folder import load
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.evals.measure import greedy
from llama_zh_nb.serving.engine import Engine
from llama_zh_nb.text.templates import find_template, get_template

torch = pytest.importorskip('torch')
for _module in ('fastapi', 'uvicorn', 'prometheus_client', 'httpx'):
    pytest.importorskip(_module)
import httpx  # noqa: E402  (the tests are skipped above where it is missing)

CODE = 'import sys; from llama_zh_nb.app import cli; sys.exit(cli.main(sys.argv[1:]))'


@pytest.fixture(scope='module')
def folder(root, tmp_path_factory):
    return chat_folder(root, tmp_path_factory.mktemp('serve'))


@pytest.fixture(scope='module')
def mini(folder):
    return load(folder, 'cpu', 'float32')


@pytest.fixture(scope='module')
def known(mini):
    return known_answers(mini)


@contextlib.contextmanager
def server(folder, *args, **env):
    "A server process on a free port; yields its address, the process and its log"
    p = subprocess.Popen(
        [
            sys.executable,
            '-c',
            CODE,
            'serve',
            str(folder),
            '--port',
            '0',
            '--name',
            'mini',
            '--preset',
            'greedy',
            '--device',
            'cpu',
            *args,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1', **env),
    )  # the clients need a core as well
    log = []
    threading.Thread(target=lambda: log.extend(p.stderr), daemon=True).start()
    try:
        line = p.stdout.readline()
        assert 'http' in line, ''.join(log)
        url = re.search(r'http://\S+(?=/v1)', line)[0]
        for _ in range(300):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f'{url}/readyz').status_code == 200:
                    break
            time.sleep(0.05)
        yield SimpleNamespace(url=url, p=p, log=log)
    finally:
        p.kill()
        p.wait()


@pytest.fixture(scope='module')
def srv(folder):
    with server(
        folder,
        '--max-new-tokens',
        '64',
        '--max-waiting',
        '200',
        '--max-batch',
        '8',
        '--max-body',
        '200000',
    ) as s:
        yield s
        assert s.p.poll() is None and 'Traceback' not in ''.join(s.log)


@pytest.fixture(scope='module')
def client(srv):
    return pytest.importorskip('openai').OpenAI(
        base_url=srv.url + '/v1', api_key='x', max_retries=0
    )


def stats(srv):
    return {
        m[1]: float(m[2])
        for m in re.finditer(r'^(llama_zh_\S+) (\S+)$', httpx.get(srv.url + '/metrics').text, re.M)
    }


def post(srv, path, **body):
    return httpx.post(srv.url + path, json=body, timeout=60)


def test_openai_client_chat(client, known):
    q, a = next(iter(known.items()))
    kw = dict(model='mini', messages=user(q), max_tokens=N)
    c = client.chat.completions.create(**kw)
    assert (
        c.choices[0].message.content == a
        and c.choices[0].finish_reason in ('stop', 'length')
        and c.usage.total_tokens == c.usage.prompt_tokens + c.usage.completion_tokens
    )
    chunks = list(
        client.chat.completions.create(**kw, stream=True, stream_options=dict(include_usage=True))
    )
    assert ''.join(x.choices[0].delta.content or '' for x in chunks if x.choices) == a
    assert (
        chunks[-1].usage == c.usage
        and not chunks[-1].choices
        and chunks[-2].choices[0].finish_reason == c.choices[0].finish_reason
    )
    assert {x.id for x in chunks} == {chunks[0].id} and chunks[0].choices[
        0
    ].delta.role == 'assistant'
    parts = [
        dict(role='developer', content='x'),
        dict(role='user', content=[dict(type='text', text=q)]),
    ]
    assert (
        client.chat.completions.create(model='mini', messages=parts, max_completion_tokens=3)
        .choices[0]
        .finish_reason
        == 'length'
    )
    cut = client.chat.completions.create(**kw, stop=[a[4:6]]).choices[0]
    assert cut.message.content == a[: a.index(a[4:6])].rstrip() and cut.finish_reason == 'stop'


def test_openai_client_sampling(client, known):
    kw = dict(
        model='mini',
        messages=user(next(iter(known))),
        max_tokens=12,
        temperature=1.9,
        top_p=0.99,
        n=3,
        seed=4,
        extra_body=dict(top_k=200, repetition_penalty=1.05),
    )
    one, two = (client.chat.completions.create(**kw) for _ in range(2))
    texts = [c.message.content for c in one.choices]
    assert (
        texts == [c.message.content for c in two.choices]
        and len(set(texts)) > 1
        and [c.index for c in one.choices] == [0, 1, 2]
    )
    streamed = {}
    for x in client.chat.completions.create(**kw, stream=True):
        streamed[x.choices[0].index] = streamed.get(x.choices[0].index, '') + (
            x.choices[0].delta.content or ''
        )
    assert [streamed[i] for i in range(3)] == texts
    assert one.usage.prompt_tokens < 60  # the prompt counts once


def test_openai_client_logprobs(client, known, mini):
    model, tok = mini
    q = next(iter(known))
    c = (
        client.chat.completions.create(
            model='mini', messages=user(q), max_tokens=6, logprobs=True, top_logprobs=3
        )
        .choices[0]
        .logprobs.content
    )
    ids = find_template(tok).encode(tok, user(q), True).ids
    with torch.inference_mode():
        lp = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert abs(c[0].logprob - lp.max()) < 1e-3 and [
        round(t.logprob, 3) for t in c[0].top_logprobs
    ] == [round(x, 3) for x in lp.topk(3).values.tolist()]
    t = client.completions.create(
        model='mini', prompt='Paris is', max_tokens=5, logprobs=2
    ).choices[0]
    assert len(t.logprobs.tokens) == 5 and all(len(x) == 2 for x in t.logprobs.top_logprobs)
    chunks = list(
        client.chat.completions.create(
            model='mini', messages=user(q), max_tokens=6, logprobs=True, stream=True
        )
    )
    assert [
        x.token for ch in chunks if ch.choices[0].logprobs for x in ch.choices[0].logprobs.content
    ] == [x.token for x in c]


def test_openai_client_completions(client, mini):
    model, tok = mini
    prompts = ['The capital of France', 'Once upon a time']
    got = client.completions.create(model='mini', prompt=prompts, max_tokens=8)
    for p, c in zip(prompts, got.choices):
        ids = [tok.bos_token_id, *tok(p, add_special_tokens=False)['input_ids']]
        new = greedy(model, tok, [ids], 8, as_ids=True)[0]
        assert (p + c.text).rstrip('\ufffd') == tok.decode(ids[1:] + new).rstrip('\ufffd')
    same = client.completions.create(
        model='mini',
        prompt=[tok.bos_token_id, *tok(prompts[0], add_special_tokens=False)['input_ids']],
        max_tokens=8,
    )
    assert same.choices[0].text == got.choices[0].text
    assert (
        ''.join(
            x.choices[0].text
            for x in client.completions.create(
                model='mini', prompt=prompts[0], max_tokens=8, stream=True
            )
        )
        == got.choices[0].text
    )


def test_openai_client_embeddings_and_models(client, mini):
    assert [m.id for m in client.models.list()] == ['mini'] and client.models.retrieve(
        'mini'
    ).id == 'mini'
    a = client.embeddings.create(model='mini', input=['法国的首都', 'Paris', 'x' * 50])  # base64
    b = client.embeddings.create(model='mini', input='Paris', encoding_format='float')
    va, vb = torch.tensor(a.data[1].embedding), torch.tensor(b.data[0].embedding)
    assert (
        torch.allclose(va, vb, atol=1e-4)
        and abs(float(va.norm()) - 1) < 1e-4
        and len(va) == mini[0].config.hidden_size
    )


@pytest.mark.parametrize(
    'body,code,param',
    [
        (dict(tools=[dict(type='function')]), 'unsupported_parameter', 'tools'),
        (
            dict(response_format=dict(type='json_object')),
            'unsupported_parameter',
            'response_format',
        ),
        (dict(logit_bias={'5': 9}), 'unsupported_parameter', 'logit_bias'),
        (dict(temperature=-1), 'invalid_value', 'temperature'),
        (dict(n=0), 'invalid_value', 'n'),
        (dict(max_tokens=10**6), 'invalid_value', 'max_tokens'),
        (dict(max_completion_tokens=10**6), 'invalid_value', 'max_completion_tokens'),
        (dict(tempurature=1), 'unknown_parameter', 'tempurature'),
        (dict(top_logprobs=2), 'invalid_value', 'top_logprobs'),
        (dict(messages=[]), 'invalid_value', 'messages'),
        (dict(messages=user('a', 'b')), 'invalid_value', 'messages'),
        (
            dict(messages=[dict(role='user', content=[dict(type='image_url')])]),
            'invalid_value',
            'messages.0.content',
        ),
        (dict(messages=user('长' * 9000)), 'context_length_exceeded', 'messages'),
        (dict(model='gpt-4'), 'model_not_found', 'model'),
        (dict(stream_options=dict(include_usage=True)), 'invalid_value', 'stream_options'),
        (dict(seed=2**70), 'invalid_value', 'seed'),
    ],
)
def test_refused_clearly(srv, body, code, param):
    e = post(srv, '/v1/chat/completions', **{'model': 'mini', 'messages': user('x'), **body})
    assert e.status_code == (404 if code == 'model_not_found' else 400), e.text
    err = e.json()['error']
    assert (
        err['code'] == code
        and err['type'] == 'invalid_request_error'
        and err['message']
        and (param is None or err['param'] == param)
    )


def test_refused_in_plain_words(srv):
    "The message says what to change, in words of the request and not of the library that checked it"

    def said(content, path='/v1/chat/completions', kind='application/json'):
        r = httpx.post(
            srv.url + path, content=content, headers={'content-type': kind} if kind else {}
        )
        assert r.status_code == 400
        return r.json()['error']['message'], r.json()['error']['param']

    assert said('{bad') == (
        'the body is not JSON: Expecting property name enclosed in double quotes at character 1',
        None,
    )
    assert said('') == ('the body is empty', None) and said('[]') == (
        'the body must be a JSON object',
        None,
    )
    for kind in ('text/plain', None):
        assert said('{"prompt": "x"}', '/v1/completions', kind) == (
            'Content-Type must be application/json',
            None,
        )
    for c in ('null', '7', '[{"type": "image_url", "image_url": {"url": "x"}}]'):
        assert said(f'{{"messages": [{{"role": "user", "content": {c}}}]}}') == (
            'messages.0.content: text, or text parts, was expected; images are not supported',
            'messages.0.content',
        )
    assert said('{"messages": [{"role": "user"}]}')[0] == 'messages.0.content: Field required'
    assert [
        said(b, p)[1]
        for p, b in (
            ('/v1/completions', '{"prompt": [9999999]}'),
            ('/v1/embeddings', '{"input": [9999999]}'),
            ('/v1/completions', '{"prompt": "%s"}' % ('长' * 9000)),
            ('/v1/completions', '{"prompt": "x", "max_tokens": 9999}'),
        )
    ] == ['prompt', 'input', 'prompt', 'max_tokens']


def test_langchain(srv, known):
    lc = pytest.importorskip('langchain_openai')
    q, a = next(iter(known.items()))
    llm = lc.ChatOpenAI(
        base_url=srv.url + '/v1', api_key='x', model='mini', max_tokens=N, temperature=0
    )
    assert llm.invoke(q).content == a
    assert ''.join(x.content for x in llm.stream(q)) == a
    some = list(known)[:6]
    assert [m.content for m in llm.batch(some)] == [known[x] for x in some]
    assert (
        len(
            lc.OpenAIEmbeddings(
                base_url=srv.url + '/v1',
                api_key='x',
                model='mini',
                check_embedding_ctx_length=False,
            ).embed_query('x')
        )
        > 8
    )


def curl(url, body, *args):
    out = subprocess.run(
        [
            'curl',
            '-sS',
            '-X',
            'POST',
            url,
            '-H',
            'Content-Type: application/json',
            '-d',
            json.dumps(body, ensure_ascii=False),
            *args,
        ],
        capture_output=True,
        text=True,
    )
    return json.loads(out.stdout)


def test_curl_linksoul_and_atom(srv, known):
    q, a = next(iter(known.items()))
    one = curl(srv.url, dict(prompt=q, history=[], temperature=0, max_length=4096))
    assert (
        set(one) == {'response', 'history', 'status', 'time'}
        and one['status'] == 200
        and re.fullmatch(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d', one['time'])
    )
    assert one['history'] == [[q, one['response']]] and one['response'].startswith(a)
    two = curl(srv.url + '/', dict(prompt='再说一遍。', history=one['history'], temperature=0))
    assert two['history'][0] == one['history'][0] and len(two['history']) == 2
    long = curl(
        srv.url, dict(prompt=q, history=[['问题' * 40, '回答' * 40]] * 10, temperature=0)
    )  # the oldest turns fall
    assert len(long['history']) == 11 and long['status'] == 200
    atom = curl(
        srv.url + '/generate',
        dict(
            history=[dict(role='Human', content=q)],
            system_prompt='',
            max_new_tokens=N,
            temperature=0,
            top_p=0.9,
        ),
    )
    assert atom['response'] == a and set(atom) == {'response', 'status', 'time'}
    assert curl(srv.url + '/generate', dict(history=[dict(role='Robot', content=q)]))['error'][
        'param'
    ].startswith('history')


def test_linksoul_system_block(mini):
    from llama_zh_nb import serve
    from llama_zh_nb.serving import legacy

    t = get_template('llama2-chat')
    with (
        Engine(mini, template=t) as e,
        serve.running(serve.make_app(e, 'x', preset='greedy')) as url,
    ):
        r = post(SimpleNamespace(url=url), '/', prompt='你好', temperature=0, max_length=400).json()
        assert r['history'][0][0] == f'<<SYS>>\n{t.default_system}\n<</SYS>>\n\n你好'
        again = legacy.linksoul_job(
            legacy.LinkSoulRequest(prompt='你好', history=[]), e, t.default_system
        )[0]['prompt']
        assert t.render(again) == '<s>[INST] ' + r['history'][0][0] + ' [/INST]'
        later = legacy.linksoul_job(
            legacy.LinkSoulRequest(prompt='再见', history=r['history']), e, t.default_system
        )[0]['prompt']
        assert (
            later[0] == dict(role='system', content=t.default_system)
            and later[-1]['content'] == '再见'
            and '<<SYS>>' not in later[1]['content']
        )


def test_bodies_that_are_no_requests(srv):
    def raw(content, kind='application/json', path='/v1/chat/completions'):
        return httpx.post(
            srv.url + path, content=content, headers={'content-type': kind}, timeout=30
        )

    cases = [
        b'',
        b'{',
        b'[]',
        b'null',
        b'"x"',
        b'\xff\xfe',
        b'{"messages":' + b'[' * 50000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "n": 1e400}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b'9' * 5000 + b'}',
    ]
    for c in cases:
        r = raw(c)
        assert r.status_code == 400 and r.json()['error']['message'], (c[:60], r.text)
    assert raw(b'{"prompt": "x"}', 'text/plain', '/v1/completions').status_code == 400
    big = raw(b'{"prompt": "' + b'x' * 300_000 + b'"}', path='/v1/completions')
    assert big.status_code == 413 and big.json()['error']['code'] == 'body_too_large'
    assert (
        httpx.post(
            srv.url + '/v1/completions',
            content=(b'x' * 10_000 for _ in range(50)),
            headers={'content-type': 'application/json'},
        ).status_code
        == 413
    )  # chunked, no length given
    assert (
        httpx.get(srv.url + '/v1/nothing').status_code == 404
        and httpx.get(srv.url + '/v1/nothing').json()['error']
    )
    assert httpx.get(srv.url + '/generate').status_code == 405
    assert httpx.get(srv.url + '/v1/models', headers=dict(host='evil.example')).status_code == 403


def test_client_gone_stops_generation(srv):
    before, body = (
        stats(srv),
        json.dumps(dict(prompt='', max_tokens=64, temperature=2, top_k=0, seed=1)).encode(),
    )
    host, port = srv.url[7:].split(':')

    def head(b):
        return (
            f'POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(b)}\r\n\r\n'.encode()
            + b
        )

    jobs = 0
    for stream in (False, True):
        for _ in range(12):
            s = socket.create_connection((host, int(port)))
            b = body[:-1] + (b', "stream": true}' if stream else b', "n": 16}')
            s.sendall(head(b))
            jobs += 1 if stream else 16
            if stream:
                s.recv(1)
            s.close()
    for _ in range(400):
        now = stats(srv)
        if (
            now['llama_zh_submitted_total'] - before['llama_zh_submitted_total'] >= jobs
            and not now['llama_zh_running']
            and not now['llama_zh_waiting']
        ):
            break
        time.sleep(0.05)
    gone = (
        now['llama_zh_answers_total{reason="cancelled"}']
        - before['llama_zh_answers_total{reason="cancelled"}']
    )
    assert (
        gone > jobs / 2
        and now['llama_zh_new_tokens_total'] - before['llama_zh_new_tokens_total'] < jobs * 64
    )


def rss(pid):
    return int(re.search(r'VmRSS:\s+(\d+)', Path(f'/proc/{pid}/status').read_text())[1]) // 1024


async def visitor(k, http, known, seen):
    "Ten requests of one client: whole, streamed, read slowly, dropped, malformed"
    rng = random.Random(k)
    for _i in range(10):
        q, kind = (
            rng.choice(list(known)),
            rng.choice(['whole', 'whole', 'stream', 'slow', 'drop', 'bad']),
        )
        body = dict(model='mini', messages=user(q), max_tokens=N)
        if kind == 'whole':
            got = (await http.post('/v1/chat/completions', json=body)).json()['choices'][0][
                'message'
            ]['content']
        elif kind == 'bad':
            r = await http.post(
                '/v1/chat/completions',
                **rng.choice(
                    [
                        dict(content=b'{', headers={'content-type': 'application/json'}),
                        dict(json=dict(body, n='x')),
                        dict(json=dict(body, messages=7)),
                    ]
                ),
            )
            assert r.status_code == 400 and r.json()['error']
            seen['bad'] += 1
            continue
        else:
            got, done = '', False
            async with http.stream(
                'POST', '/v1/chat/completions', json=dict(body, stream=True)
            ) as r:
                async for line in r.aiter_lines():
                    if kind == 'slow':
                        await asyncio.sleep(0.01)
                    if line == 'data: [DONE]':
                        done = True
                    elif line.startswith('data:'):
                        got += json.loads(line[5:])['choices'][0]['delta'].get('content') or ''
                    if kind == 'drop' and got:
                        break
            if kind == 'drop':
                assert known[q].startswith(got)
                seen['drop'] += 1
                continue
            assert done
        assert got == known[q], (kind, q)
        seen['right'] += 1


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is read from /proc')
def test_load(srv, known):
    async def crowd(clients, seen):
        async with httpx.AsyncClient(
            base_url=srv.url, timeout=120, limits=httpx.Limits(max_connections=64)
        ) as http:
            await asyncio.gather(*[visitor(k, http, known, seen) for k in clients])

    seen = dict(right=0, drop=0, bad=0)
    asyncio.run(crowd(range(100, 106), dict(seen)))  # warm: what is kept for reuse is kept
    before, level = stats(srv), rss(srv.p.pid)
    asyncio.run(crowd(range(32), seen))
    assert sum(seen.values()) == 320 and min(seen.values()) > 20
    for _ in range(200):
        now = stats(srv)
        if not now['llama_zh_running'] and not now['llama_zh_waiting']:
            break
        time.sleep(0.05)
    more = {k: now[k] - before.get(k, 0) for k in now}
    assert (
        more['llama_zh_submitted_total']
        == seen['right'] + seen['drop']
        == sum(v for k, v in more.items() if k.startswith('llama_zh_answers'))
    )
    assert (
        more['llama_zh_answers_total{reason="error"}'] == more['llama_zh_refused_total'] == 0
        and now['llama_zh_most_rows'] == 8
    )
    assert rss(srv.p.pid) - level < 60, f'{level} MiB before, {rss(srv.p.pid)} after'


def fuzz(srv, examples):
    st, hy = pytest.importorskip('schemathesis'), pytest.importorskip('hypothesis')
    from schemathesis import checks as c
    from schemathesis.specs.openapi import checks as o

    schema, count = st.openapi.from_url(srv.url + '/openapi.json'), 0
    for op in (r.ok() for r in schema.get_all_operations()):
        for mode in (st.GenerationMode.POSITIVE, st.GenerationMode.NEGATIVE):
            try:
                strategy = op.as_strategy(generation_mode=mode)
            except Exception:
                continue  # nothing to negate

            @hy.settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hy.HealthCheck),
            )
            @hy.given(case=strategy)
            def one(case):
                nonlocal count
                r = case.call(timeout=60)
                count += 1
                case.validate_response(
                    r,
                    checks=[
                        c.not_a_server_error,
                        o.status_code_conformance,
                        o.content_type_conformance,
                        o.response_schema_conformance,
                        o.response_headers_conformance,
                    ],
                )

            with contextlib.suppress(hy.errors.Unsatisfiable):
                one()
    return count


def test_fuzz(srv):
    assert fuzz(srv, 5) > 50


@pytest.mark.slow
def test_fuzz_long(srv):
    assert fuzz(srv, 300) > 2000


def test_no_words_in_the_log(srv, known):
    text = ''.join(srv.log)
    assert '/v1/chat/completions 200' in text and not any(
        q in text or (len(a) > 8 and a in text) for q, a in known.items()
    )


def test_key_line_and_end(folder, known, tmp_path):
    "Its own process: an API key, a line of one, then a signal to stop while somebody is being answered"
    (tmp_path / 'key').write_text('sésame\n', encoding='utf-8')
    q, a = max(known.items(), key=lambda x: len(x[1]))
    with server(
        folder,
        '--api-key-file',
        str(tmp_path / 'key'),
        '--max-batch',
        '1',
        '--max-waiting',
        '1',
        '--max-new-tokens',
        '400',
        '--linger',
        '1.5',
    ) as s:

        def get(path, key=None):
            return httpx.get(
                s.url + path, headers={'authorization': f'Bearer {key}'.encode()} if key else {}
            )

        assert [
            get(p).status_code
            for p in ('/v1/models', '/metrics', '/openapi.json', '/healthz', '/readyz')
        ] == [401, 401, 401, 200, 200]
        assert [
            get('/v1/models', k).status_code for k in ('wrong', 'sésam', 'sésamee', 'sésame')
        ] == [401, 401, 401, 200]
        assert (
            get('/v1/models').json()['error']['code'] == 'invalid_api_key'
            and httpx.post(s.url, json=dict(prompt='x')).status_code == 401
        )
        http = httpx.Client(
            base_url=s.url, headers={'authorization': 'Bearer sésame'.encode()}, timeout=60
        )
        long, said = dict(prompt='', max_tokens=400, temperature=2, top_k=0, top_p=1), []
        for _ in range(
            5
        ):  # answers of chance may be short: ask until some had to wait too long in line
            with ThreadPoolExecutor(12) as pool:
                said += pool.map(
                    lambda i: http.post('/v1/completions', json=dict(long, seed=i)), range(12)
                )
            full = [r for r in said if r.status_code == 429]
            if full:
                break
        assert full and {r.status_code for r in said} == {200, 429}
        for r in full:
            assert (
                int(r.headers['retry-after']) >= 1
                and r.json()['error']['type'] == 'rate_limit_error'
            )
        for _ in range(200):  # all have left
            if http.post('/v1/completions', json=dict(prompt='x', max_tokens=1)).status_code == 200:
                break
            time.sleep(0.05)
        with http.stream(
            'POST', '/v1/chat/completions', json=dict(messages=user(q), max_tokens=N, stream=True)
        ) as r:
            lines = r.iter_lines()
            got = [next(lines)]
            s.p.send_signal(signal.SIGTERM)
            until = time.time() + 1.2
            while httpx.get(s.url + '/readyz').status_code != 503:
                assert time.time() < until
                time.sleep(0.05)
            assert httpx.get(s.url + '/healthz').status_code == 200
            refused = httpx.post(
                s.url + '/v1/completions',
                json=dict(prompt='x'),
                headers={'authorization': 'Bearer sésame'.encode()},
            )
            assert refused.status_code == 503 and 'retry-after' in refused.headers
            got += lines
        words = [
            json.loads(line[5:])['choices'][0]
            for line in got
            if line.startswith('data:') and 'DONE' not in line
        ]
        assert (
            ''.join(w['delta'].get('content') or '' for w in words) == a
            and got[-2] == 'data: [DONE]'
        )
        assert s.p.wait(20) == 0 and 'Traceback' not in ''.join(s.log)


def test_no_route_is_left_open(mini):
    "Every route is guarded, a new one too; without a key only the two that say how the server is"
    from fastapi.testclient import TestClient

    from llama_zh_nb.serve import guarded_paths, make_app

    with Engine(mini) as engine:
        app = make_app(engine, 'mini', api_key='key', max_body=10)
        client = TestClient(app)
        routes = [(r.path, m) for r in app.routes for m in r.methods]
        assert len(routes) > 10
        free = {p for p, m in routes if client.request(m, p).status_code != 401}
        assert free == {'/healthz', '/readyz'}
        key = {'authorization': 'Bearer key'}
        posts = [p for p, m in routes if m == 'POST']
        assert posts
        for p in posts:
            assert client.post(p, content=b'x' * 11, headers=key).status_code == 413, p
        app.get('/new')(lambda: {})
        assert '/new' in guarded_paths(app)
        app.get('/new/{name}')(lambda name: {})
        with pytest.raises(ValueError, match='below /v1/'):
            guarded_paths(app)


def test_wrong_starts(folder, tmp_path, monkeypatch):
    from llama_zh_nb.serve import serve

    (tmp_path / 'empty').write_text('')
    (tmp_path / 'two').write_text('a\nb\n')
    taken = socket.socket()
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    for kw, word in (
        (dict(model='nowhere'), 'not a model'),
        (dict(engine='vlm'), 'vllm'),
        (dict(preset='hot'), 'preset'),
        (dict(port=taken.getsockname()[1]), 'in use'),
        (dict(port=-1), 'port'),
        (dict(host='no.such.host.invalid'), 'listen'),
        (dict(api_key_file=str(tmp_path / 'empty')), 'alone'),
        (dict(api_key_file=str(tmp_path / 'two')), 'one line'),
        (dict(api_key_file=str(tmp_path)), 'directory'),
        (dict(max_batch=0), '1 or more'),
        (dict(max_seconds=-1), 'more than 0'),
        (dict(template='nonsense'), 'template'),
    ):
        with pytest.raises(LlamaZhError, match=word):
            serve(**{'model': str(folder), 'port': 0, 'device': 'cpu', **kw})
    taken.close()
    monkeypatch.setenv('PATH', '')
    with pytest.raises(LlamaZhError, match='pip install vllm'):
        serve(str(folder), engine='vllm')
    with pytest.raises(LlamaZhError, match='nowhere is not a model: there is no such folder'):
        serve('nowhere', engine='vllm')


def test_vllm_gets_the_folder(folder, tmp_path):
    "A stand-in for vLLM prints what it was given"
    (tmp_path / 'vllm').write_text(
        f'#!{sys.executable}\nimport os, sys, json; print(json.dumps([sys.argv[1:], os.environ.get("VLLM_API_KEY")]))'
    )
    (tmp_path / 'vllm').chmod(0o755)
    p = subprocess.run(
        [sys.executable, '-c', CODE, 'serve', str(folder), '--engine', 'vllm', '--name', 'm'],
        capture_output=True,
        text=True,
        env=dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}', LLAMA_ZH_API_KEY='k'),
    )
    args, key = json.loads(p.stdout)
    assert (
        args[:2] == ['serve', str(folder)]
        and args[args.index('--chat-template') + 1].endswith('chat_template.jinja')
        and key == 'k'
        and 'k' not in args
    )
