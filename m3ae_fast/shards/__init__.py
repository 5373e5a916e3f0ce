"""Programs that make shards, and what trains on them: `m3ae-fast shards` lists them.

A tool is a module with `run(args)`, and a parser in `data/__main__.py`. Converters describe their input as `Records`;
`writer.convert` makes shards of it.
"""
