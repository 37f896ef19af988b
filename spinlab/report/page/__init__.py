"""One static page of records: HTML, style and script as files, filled by `build`.

It asks nothing of a network: everything is in the one file, and its Content-Security-Policy allows
the hashes of its own style and script, images inside it, and nothing else.
"""
