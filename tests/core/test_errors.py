"core: errors that explain, writing that cannot be half done, files recognised by content"

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_zh_nb.core.errors import LlamaZhError, need, read_json, what_is, writing


def test_import_is_light():
    code = "import sys, llama_zh_nb.core.errors, llama_zh_nb.evals.measure, llama_zh_nb.recipes; print(sorted({'torch','transformers','sentencepiece','yaml','pandas'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip()
        == '[]'
    )


def test_writing_replaces_file_and_folder(tmp_path):
    for _ in range(2):
        with writing(tmp_path / 'a' / 'f.txt') as t:
            t.write_text('1')
        with writing(tmp_path / 'd') as t:
            t.mkdir()
            (t / 'x').write_text('1')
    assert (tmp_path / 'a' / 'f.txt').read_text() == '1' and [
        p.name for p in (tmp_path / 'd').iterdir()
    ] == ['x']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'd']


def test_writing_keeps_the_old_on_failure(tmp_path):
    (tmp_path / 'f').write_text('old')
    with pytest.raises(ValueError), writing(tmp_path / 'f') as t:
        t.write_text('new')
        raise ValueError
    assert (tmp_path / 'f').read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['f']


def test_writing_nothing_is_an_error(tmp_path):
    with pytest.raises(LlamaZhError, match='nothing was written'), writing(tmp_path / 'f'):
        pass


def test_full_disk_is_one_message(tmp_path):
    with pytest.raises(LlamaZhError, match='no space left'), writing(tmp_path / 'f') as t:
        t.write_text('x')
        Path('/dev/full').write_text('x' * 10_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(LlamaZhError, match='may not write'), writing(tmp_path / 'f') as t:
            t.write_text('x')
    finally:
        tmp_path.chmod(0o700)


def test_killed_writer_leaves_nothing_after_the_next(tmp_path):
    code = "import sys, time; from llama_zh_nb.core.errors import writing\nwith writing(sys.argv[1]) as t: t.mkdir(); (t/'half').write_text('x'); print('in', flush=True); time.sleep(60)"
    p = subprocess.Popen(
        [sys.executable, '-c', code, str(tmp_path / 'm')], stdout=subprocess.PIPE, text=True
    )
    assert p.stdout.readline().strip() == 'in'
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (tmp_path / 'm').exists()
    with writing(tmp_path / 'm') as t:
        t.mkdir()
    assert [q.name for q in tmp_path.iterdir()] == ['m']


def test_need_names_the_extra():
    with pytest.raises(LlamaZhError, match=r'llama-zh-nb\[quant\]'):
        need('surely_not_there', 'quant')


def test_read_json_names_line(tmp_path):
    (tmp_path / 'x.json').write_text('\ufeff{"a": 1}')
    assert read_json(tmp_path / 'x.json') == {'a': 1}
    (tmp_path / 'y.json').write_text('{\n"a": nope}')
    with pytest.raises(LlamaZhError, match='line 2'):
        read_json(tmp_path / 'y.json')
    with pytest.raises(LlamaZhError, match='folder'):
        read_json(tmp_path)


def test_what_is_real_files(tmp_path, shared):
    d = shared / 'data'
    assert what_is(d / 'models' / 'stories260K_hf' / 'model.safetensors') == 'a safetensors file'
    assert what_is(d / 'models' / 'stories260K_hf' / 'tokenizer.model') == 'a SentencePiece model'
    assert what_is(d / 'models' / 'stories260K_hf' / 'config.json') == 'JSON'


def test_what_is_torch_zip(tmp_path):
    import torch

    torch.save({'a': torch.zeros(3)}, tmp_path / 'x.pth')
    assert what_is(tmp_path / 'x.pth') == 'a PyTorch zip checkpoint'
