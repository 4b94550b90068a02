"progress: a bar for people, lines for a log, silence where it is asked for"

import os
import subprocess
import sys

import pytest

CODE = """
import time, llama_zh_nb.core.machine as m
m._LOG_SECONDS = 0.2
for i in m.progress(range(12), 'reading'):
    time.sleep(0.1)
bar = m.progress(desc='training', total=4, initial=1)
time.sleep(0.3)
bar.set_postfix({'loss': 2.5}, refresh=False)
bar.update(1)
bar.close()
"""


@pytest.mark.parametrize(
    'env,speaks', [({}, True), ({'LLAMA_ZH_PROGRESS': '0'}, False), ({'RANK': '1'}, False)]
)
def test_a_log_gets_plain_lines(env, speaks):
    env = {k: v for k, v in os.environ.items() if k != 'LLAMA_ZH_PROGRESS'} | env
    p = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, env=env)
    assert p.returncode == 0, p.stderr
    lines = p.stderr.splitlines()
    if not speaks:
        assert lines == []
        return
    assert '\r' not in p.stderr and 3 <= len(lines) <= 8, lines
    assert lines[0].startswith('reading: ') and ' of 12, 00:' in lines[0]
    assert 'training: 2 of 4' in lines[-1] and 'loss=2.5' in lines[-1]
