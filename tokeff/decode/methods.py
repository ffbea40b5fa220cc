"""Published ways to commit more than one token a pass."""

from __future__ import annotations

from tokeff.decode.depth import FfnSkip, SkipDecode
from tokeff.decode.draft import Drafter, Plain
from tokeff.decode.draft_model import DraftModel
from tokeff.decode.dynamic_exit import DynamicExit
from tokeff.decode.equal_growth import EqualGrowth
from tokeff.decode.jacobi import Lookahead
from tokeff.decode.lookup import PromptLookup
from tokeff.decode.lossy import Rapid
from tokeff.decode.paced import CURVE, Paced
from tokeff.decode.pearl import Pearl
from tokeff.decode.recycling import TREE_4, TokenRecycling
from tokeff.decode.retrieval import RetrievedDraft
from tokeff.decode.route import Routed
from tokeff.decode.rules import KSeq
from tokeff.decode.self_draft import EarlyExit
from tokeff.decode.swift import Swift
from tokeff.decode.swift_online import OnlineSwift
from tokeff.decode.trie import Trie
from tokeff.decode.trigram import Trigram
from tokeff.kv.budget import Budget
from tokeff.models.config import Config

_LOOKUP = PromptLookup()


def plain() -> Plain:
    """One token a pass."""
    return Plain()


def prompt_lookup(length: int = 10, ngram: int = 3, latest: bool = False) -> PromptLookup:
    """Prompt lookup decoding (Saxena 2023): copy what followed the last n-gram before."""
    return PromptLookup(length, ngram, latest)


def token_recycling(tree: tuple[tuple[int, ...], ...] = TREE_4, rank: int = 8) -> TokenRecycling:
    """Token Recycling (Luo et al. 2024): a static tree over each token's last seen successors.

    The default tree is the best on two CPU cores; where a pass is bound by reading weights larger ones are (decode/recycling.py has some,
    and `best_tree` finds yours)."""
    return TokenRecycling(tree, rank)


def lookahead_trie(nodes: int = 16, length: int = 10, query: int = 2, weight: float = 1e-4, own: float = 0.5, most: int = 32) -> Trie:
    """Lookahead with a trie (Zhao et al. 2024): all that followed the last tokens before, merged into one tree of the most frequent."""
    return Trie(nodes, length, query, weight, own, most)


def lookahead_decoding(
    window: int = 3, ngram: int = 5, guesses: int = 3, pool: int = 1024, fill: bool = True, shift: bool = True
) -> Lookahead:  # fmt: skip
    """Lookahead decoding (Fu et al. 2024): a window of Jacobi iterations ahead makes n-grams, and those that begin rightly are verified."""
    return Lookahead(window, ngram, guesses, pool, fill, shift)


def aded(
    nodes: int = 16, paths: int = 8, length: int = 6, simulations: int = 32, successors: int = 12, recent: int = 16, gain: float = 0.04,
    cap: float = 3.0, c1: float = 32.0, c2: float = 8.0,
) -> Trigram:  # fmt: skip
    """ADED (Liu et al. 2025): a Monte Carlo tree search over the text's trigrams, which stand in for the model."""
    return Trigram(nodes, paths, length, simulations, successors, recent, gain, cap, c1, c2)


def paced(
    drafter: Drafter = _LOOKUP, widths: tuple[int, ...] = (1, 4, 8, 16), cost: tuple[tuple[int, float], ...] = CURVE, rate: float = 0.2,
    tries: int = 8, rarest: int = 64,
) -> Paced:  # fmt: skip
    """SmartSpec's goodput (Liu et al. 2024) over any drafter: as many nodes a pass as pay at this load, none where none does."""
    return Paced(drafter, widths, cost, rate, tries, rarest)


def rapid(
    cfg: Config, length: int = 10, eta: float = 10.0, chunk: int = 64, budget: Budget = 0.125, head: int = 32, question: int = 64
) -> RetrievedDraft:  # fmt: skip
    """RAPID (Chen et al. 2025): a model as large as the target drafts from a short context retrieved from the prompt, and the target leans
    towards it by `eta`; lossless at 0. With the target's own weights: rapid(m.cfg) on m.attach(draft=m.params)."""
    return RetrievedDraft(cfg, length, coupled=False, rule=Rapid(eta), chunk=chunk, budget=budget, head=head, question=question)


def ffn_skipllm(tau: float = 0.98, head: Budget = 0.5, tail: Budget = 0.1, warm: int = 4) -> FfnSkip:
    """FFN-SkipLLM (Jaiswal et al. 2024): feed-forwards above one that hardly turns the row are left out. A mechanism, untuned."""
    return FfnSkip(tau, head, tail, warm)


def skip_decode(most: Budget = 1.0, least: Budget = 0.5, warm: int = 1, over: int = 64, stairs: int | None = 4) -> SkipDecode:
    """SkipDecode (Del Corro et al. 2023): fewer layers for later tokens, the topmost. A mechanism, untuned."""
    return SkipDecode(most, least, warm, over, stairs)


def r2r(cfg: Config, length: int = 8, sure: float = 0.9, name: str = "small") -> Routed:
    """R2R (Fu et al. 2025): a small model generates, the large one where it is unsure: m.attach(small=s.params). A mechanism, untuned."""
    return Routed(cfg, length, sure, name=name)


def early_exit(exit: int = 8, length: int = 6) -> EarlyExit:
    """LayerSkip's self-speculation (Elhoushi et al. 2024): the first layers draft, the others verify. A mechanism, untuned."""
    return EarlyExit(exit=exit, length=length)


def swift(
    attention: tuple[int, ...] | None = None, ffn: tuple[int, ...] | None = None, length: int = 5, candidates: int = 3, sure: float = 0.8,
    share: float = 0.45, tail: int = 50,
) -> Swift | OnlineSwift:  # fmt: skip
    """SWIFT (Xia et al. 2024): the model drafts without some halves of its layers, and finds out which while it generates: a `share`, by
    the last `tail` tokens. Those found before are given instead, and nothing is searched: swift(*find_skips(m, ids))."""
    if attention is None and ffn is None:
        return OnlineSwift(length, candidates, sure, share, tail)
    return Swift(attention or (), ffn or (), length, candidates, sure)


def dynamic_exit(exits: tuple[int, ...] = (4, 8, 12), lengths: tuple[int, ...] = (2, 4, 6), every: int = 8) -> DynamicExit:
    """DEL (Entezari Zarch et al. 2025): early exit whose layer and length are chosen by what each would have been worth. A mechanism,
    untuned."""
    return DynamicExit(exits, lengths, every)


def draft_model(
    cfg: Config, length: int = 5, copies: int = 1, tree: tuple[tuple[int, ...], ...] | None = None, coupled: bool = True
) -> DraftModel:  # fmt: skip
    """A draft model (Leviathan et al. 2023), attached beside the target: draft_model(d.cfg) on m.attach(draft=d.params)."""
    return DraftModel(cfg, length, copies=copies, tree=tree, coupled=coupled)


def equal_growth(cfg: Config, length: int = 4, width: int = 4, guesses: int = 8, coupled: bool = True) -> EqualGrowth:
    """Yggdrasil's equal-growth tree (Guan et al. 2025): in each step a draft model adds as many nodes, wherever it is surest.

    Attached beside the target: equal_growth(d.cfg) on m.attach(draft=d.params)."""
    return EqualGrowth(cfg, length, width, guesses, coupled=coupled)


def pearl(cfg: Config, length: int = 4) -> Pearl:
    """PEARL (Liu et al. 2024): a draft model that writes on while the target verifies, on devices of its own where it is placed there."""
    return Pearl(cfg, length)


def spectr(cfg: Config, length: int = 4, copies: int = 4) -> DraftModel:
    """SpecTr (Sun et al. 2023): several independent chains of a draft model, accepted by k-sequential selection."""
    return DraftModel(cfg, length, copies=copies, coupled=False, rule=KSeq())
