"""A package in TransformerEngine's place on a CPU, and what is known of TransformerEngine's own signatures.

The folder `transformer_engine` is found by upstream where this folder is on the path, in processes of their own: see
`runs.py`. `signatures.json` is read from TransformerEngine's sources by `signatures.py`.
"""
