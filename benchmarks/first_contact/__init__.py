"""Ten minutes with a card: everything that only a GPU can tell, measured by one command and written down as it ends.

`python -m benchmarks.first_contact --out DIR --minutes 9`
"""
