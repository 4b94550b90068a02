"Without LangChain: one line that says what to install, and help all the same."

import subprocess
import sys

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('langchain_core', 'langchain_text_splitters'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Block())
"""


def run(code):
    p = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', BLOCKED + code], capture_output=True, timeout=300
    )
    return p.returncode, p.stdout.decode(), p.stderr.decode()


def test_import_names_the_extra():
    code, _, err = run('from llama_zh_nb.rag import build_index')
    assert code and err.strip().split('\n')[-1].endswith("pip install 'llama-zh-nb[rag]'")


def test_command_says_it_in_one_line_and_help_stays():
    main = 'from llama_zh_nb.app.cli import main; sys.exit(main({}))'
    code, out, err = run(main.format("['--help']"))
    assert code in (0, None) and 'rag ask' in out
    code, out, err = run(main.format("['rag', 'ask', 'index', 'question']"))
    assert code and 'llama-zh-nb[rag]' in err and 'Traceback' not in err
