"Files for tests"


def write(d, name, text, **kw):
    "A text file in folder `d`, line ends as they are"
    p = d / name
    p.write_text(text, encoding=kw.pop('encoding', 'utf-8'), newline='')
    return p
