"""The settings each method was published with, one constant a method: what to give its expression for the paper's own numbers.

What a constant does not name is as in the expression. Rows are numbers where the paper gives numbers. Many papers report several budgets;
one of theirs stands here. Heads and layers that are found by a search on the model cannot stand in a table; the docstrings name the search.
"""

from __future__ import annotations

from tokeff.decode.recycling import TREE_80
from tokeff.kv import methods as kv
from tokeff.kv.budget import AtLeast

STREAMING = {"budget": 2004, "sinks": 4, "evict": 1}  # demo of the released code: 4 and 2000
H2O = {"budget": 0.2, "recent": 0.5, "evict": 1}  # paper: 20% of the cache, half heavy hitters, half recent
INFINITE = {"budget": 4106, "sinks": 10, "cap": 4096, "evict": 1}  # released code for Llama-2: 10 rows and its training length
TOVA = {"budget": 512, "evict": 1}  # paper: an eighth of the 4096 it was trained with
A2SF = {"budget": 256, "factor": 0.95, "recent": 16, "evict": 1}  # released configuration
ALISA = {"budget": 0.2, "recent": 0.5, "evict": 1}  # paper: 80% sparsity; how many steps are summed is not recovered
KNORM = {"budget": 0.5, "spared": (0, 1)}  # paper: half of the cache; released code: the first two layers spared
KEYDIFF = {"budget": 8192, "evict": 1}  # paper: up to 8192
LAGKV = {"budget": 0.5, "lag": 128, "sinks": 4}  # paper: 2x to 8x, a lag of 128
EXPECTED = {"budget": 0.5, "future": 512, "sinks": 4, "floor": 0.0}  # released code
CHUNKKV = {"budget": 0.1, "chunk": 10}  # paper: a tenth of the cache, chunks of 10; the window is ours
RKV = {"budget": 1152, "window": 8, "weight": 0.1, "evict": 128}  # paper: 1024 rows and a buffer of 128
SNAPKV = {"budget": 1024, "window": 32, "kernel": 7, "pool": "max"}  # LongBench configuration of the released code
PYRAMID = {"budget": 128, "window": 8, "kernel": 7, "pool": "max", "beta": 20}  # LongBench configuration; 64 to 2048 rows
RAZOR = {"budget": AtLeast(0.2, 4000), "sinks": 4, "weighted": True}  # paper: max(4000, n / 5)
DUO = {"budget": 320, "sinks": 64, "evict": 1}  # deployment: 64 sinks and 256 recent rows
COMPRESS = {"budget": 256, "window": 8, "kernel": 5, "floor": 32}  # paper: mean budgets of 128 to 2048, at least 32 a layer
KVZIP = {"budget": 0.3, "sinks": 4, "piece": 2048}  # paper: down to 0.3, pieces of 2048 tokens
ADAKV = {"budget": 1024, "window": 32, "kernel": 7, "pool": "max", "floor": 0.2}  # paper: 128 to 1024
SHADOWKV = {"budget": 2048, "rank": 160, "outliers": 48}  # released code: rank 160, 48 outlier chunks of 8
CAM = {"budget": 0.2, "sinks": 0.5, "over": 32, "evict": 1}  # released commands: a tenth first, a tenth recent
LOOKM = {"budget": 0.2, "recent": 0.5, "how": "pivot"}  # paper: a tenth heavy, a tenth recent
EMS = {"budget": 256}  # paper; window, threshold and share of merges are not recovered
KIVI = {"bits": 2, "group": 32, "residual": 128}  # paper; 32 for short prompts
GEAR = {"bits": 2, "group": 64, "residual": 64, "rank": 4, "outliers": 0.01}  # released code
MINICACHE = {"first": 0.5, "t": 0.6, "outliers": 0.05}  # paper
MINICACHE_4BIT = {**MINICACHE, "bits": 4, "group": 32, "residual": 32}
THINK = {"channels": 0.6, "window": 32, "rule": kv.snapkv(**SNAPKV)}  # paper: 40% of the channels gone, on SnapKV
TRANSMLA = {"rank": 512, "rope": 64, "converted": True}  # released code: 512 directions and 64 rotated numbers; then it trains

TIDAL = {"budget": 256, "dense": (0, 1), "select": (2, 9), "recent": 1}  # demo of the released code; 64 to 4096
QUEST = {"budget": 2048, "page": 16, "dense": (0, 1), "recent": 1}  # paper: 512 to 4096
DOUBLE = {"budget": 128, "labels": 0.25, "dense": (0, 1), "recent": 1}  # released code: 128 rows, a quarter of the channels
TOKENSELECT = {"budget": 2688, "sinks": 128, "recent": 512, "cosine": 0.9}  # paper: 2048 voted for
KASCADE = {"budget": AtLeast(0.1, 128), "dense": (0, 1), "select": (2, 8, 13, 14), "recent": 1}  # Llama-3.1-8B
INFLLM = {"budget": 6400, "page": 128, "count": 4, "sinks": 128, "recent": 4096}  # 16 blocks of 128
HIP = {"budget": 3336, "page": 8, "start": 256, "every": 8, "sinks": 256, "recent": 1024, "dense": (0, 1, 2, 3, 31)}  # 2048 chosen
LSERVE = {"budget": 4096, "page": 64, "logical": 16, "every": 4, "sinks": 128, "recent": 256}  # paper
SENTENCEKV = {"budget": 1024, "factor": 3.0, "sinks": 32, "recent": 32, "window": 32, "kernel": 7}  # 128 to 2048; 5 times in the code
RECYCLED = {"budget": 0.125, "every": 10, "recent": 10}  # paper, as a reproduction reports it: an eighth, every 10 steps
GEMFILTER = {"budget": 1024, "layer": 13}  # Llama-3.1-8B
DISTILL = {"budget": 1024, "layer": 13}
LAZY: dict[str, object] = {}  # where it prunes and how much are not recovered
SPATTEN = {"budget": 0.3, "at": (1 / 24, 1 / 12, 1 / 6, 5 / 12)}  # released trace of GPT-2 medium: .9, .8, .6 and .3 of 1024 rows
SPATTEN_HEADS = SPATTEN | {"heads_left": 0.625, "heads_at": (0.625, 0.875)}  # 13, then 10 of 16 heads
SPATTEN_CACHE = {"high": 8, "low": 4, "values": 0.3}  # 12 bits, 4 of them on demand; its threshold is not recovered
# Passes over rows of pictures, in decoders of 32 layers (AIM: 28) that read 576 rows of a picture
FASTV = {"budget": 0.5, "layer": 2}  # paper: K 2, R 50%
PYRAMIDDROP = {"share": 0.5, "at": (8, 16, 24)}
SPARSEVLM = {"keep": (300, 200, 110), "at": (3, 7, 16)}  # released code, for 192 rows in the mean
DART = {"budget": 128, "layer": 2, "pivots": 4}
TRANSPRUNE = {"keep": (0.875, 0.625, 0.125), "at": (7, 9, 12)}  # released script
AIM = {"first": 14, "layers": 8}
MUSTDROP = {"total": 0.001, "single": 0.001, "at": (2, 6, 10, 14)}  # released code, for about 192 rows
A_SHAPE = {"sinks": 128, "window": 3968, "dense": 0, "block": 64}  # released code
TRI_SHAPE = {**A_SHAPE, "dense": 100}
BLOCK_TOP_K = {"top": 100, "dense": 0, "block": 64}
MINFERENCE = {"vertical": 1000, "slash": 96, "first": 30, "top": 100, "sinks": 128, "window": 3968, "dense": 0, "block": 64}
FLEXPREFILL = {"gamma": 0.9, "tau": 0.1, "most": 1024, "vertical": 4096, "dense": 0, "block": 128}  # without upper bounds there
S2 = {"near": 32, "stride": 8, "dense": 0, "block": 64}  # released example
VIDEOXL2 = {"previous": 3, "dense": 0}  # four chunks in sight; what a chunk of frames is in text is ours
LOOKUP = {"length": 10, "ngram": 3, "latest": False}
RECYCLING = {"tree": TREE_80, "rank": 8}  # appendix
HYDRAGEN: dict[str, object] = {}  # exact: no numbers to choose
CACHEBLEND = {"chunk": 512, "share": 0.15, "layer": 1}  # paper: 15% of the rows computed anew, chunks of 512
KVSHARE: dict[str, object] = {}  # constants are not recovered
TRIE = {"nodes": 64, "length": 12, "query": 2, "weight": 1e-4, "own": 0.5}  # released code; 128 nodes of 32 for retrieval
LADE = {"window": 7, "ngram": 5, "guesses": 7, "fill": False, "shift": False}  # released code, 7B; 15, 5 and 15 in its MT-bench script
ADED = {  # released code; its 24 paths count the root's own
    "nodes": 64, "paths": 23, "length": 4, "simulations": 150, "successors": 12, "recent": 16, "gain": 0.04, "cap": 3.0,
    "c1": 32.0, "c2": 8.0,
}  # fmt: skip
EXIT = {"exit": 8, "length": 6}  # released code, Llama-2-7B trained for it
SWIFT = {"length": 25, "sure": 0.8}  # released code; 45% of the halves left out
DEL = {"exits": (4, 8, 12), "lengths": (6, 12, 18), "every": 1}  # paper: any layer, up to 18 tokens, every block
SMARTSPEC: dict[str, object] = {}  # its curve is the machine's own
DRAFT = {"length": 5}  # paper: 3 to 7
SPECTR = {"length": 8, "copies": 8}  # paper: K = L = 8
YGGDRASIL = {"length": 8, "width": 8}  # paper: 8 steps of 8, of which as many are verified as pay, up to 64
PEARL = {"length": 4}  # paper: the ratio of speeds, 2 to 6
RAPID = {"length": 10, "eta": 10.0, "chunk": 512, "budget": AtLeast(1 / 32, 4096)}  # eta 5 to 50; chunks of 128 in the script
FFNSKIP: dict[str, object] = {}  # threshold and cold regions are calibrated there
SKIPDECODE: dict[str, object] = {}  # budgets are per task there
R2R: dict[str, object] = {}  # the router is trained there
