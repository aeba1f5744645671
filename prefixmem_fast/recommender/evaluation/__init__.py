"""How good a generative recommender is, by the metrics of PrefixMem (arXiv 2606.00324).

teacher_forcing.py   TF-L, the accuracy of each level
beams.py             beam search that reads a history once
retrieval.py         recall, NDCG, SID hit rate
baselines.py         popularity, first-order Markov, the count table
description.py       SID to text, by BLEU
report.py            all of them, as JSON and as a table
"""
