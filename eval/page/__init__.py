"""The pages of `opt report`: one run in full, or any number side by side. HTML and SVG by hand; no model, no script.

run.py          a run's folder -> Run
single.py       the page of one run, of the sections in retrieval.py words.py pictures.py probe.py training.py
comparison.py   the page of several, of compared.py: which figures may be compared, and which is the best
reported.json   the figures of the paper, shown grey and never compared
markup.py       elements that escape; dots.py and lines.py draw
"""
