"""Package metadata, read from settings.ini (nbdev's file). `pip install .[train]` and friends."""
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(here/'settings.ini', encoding='utf-8')
s = cfg['DEFAULT']

extras = {o: s[f'{o}_requirements'].split() for o in 'train quant rag serve eval deploy milvus scale dev'.split()}
extras['all'] = sorted({r for o in extras if o not in ('dev', 'scale', 'milvus') for r in extras[o]})

def readme():
    "README.md with links that also lead somewhere outside the repository."
    text = (here/'README.md').read_text(encoding='utf-8') if (here/'README.md').exists() else ''
    text = re.sub(r'(!\[[^\]]*\])\((?![a-z]+:|#)', rf"\1({s['git_url']}/raw/{s['branch']}/", text)
    return re.sub(r'(\])\((?![a-z]+:|#)', rf"\1({s['git_url']}/blob/{s['branch']}/", text)

setup(
    name=s['lib_name'],
    version=s['version'],
    description=s['description'],
    long_description=readme(),
    long_description_content_type='text/markdown',
    author=s['author'],
    author_email=s['author_email'],
    url=s['git_url'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=s['keywords'],
    python_requires=f">={s['min_python']}",
    packages=find_packages(include=['llama_zh_nb', 'llama_zh_nb.*']),
    package_data={'llama_zh_nb': ['data/**']},
    include_package_data=False,  # package_data above is the whole list
    install_requires=s['requirements'].split(),
    extras_require=extras,
    entry_points={'console_scripts': ['llama-zh = llama_zh_nb.app.cli:main'], 'nbdev': [f"{s['lib_name']} = {s['lib_name']}._modidx:d"]},
    classifiers=['Development Status :: 4 - Beta', 'Intended Audience :: Developers', 'Intended Audience :: Science/Research',
                 'Natural Language :: English', 'Natural Language :: Chinese (Simplified)',
                 'Programming Language :: Python :: 3', 'Programming Language :: Python :: 3.11', 'Programming Language :: Python :: 3.12',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Topic :: Text Processing :: Linguistic'],
    zip_safe=False,
)
