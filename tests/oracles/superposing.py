"""Superposed Decoding as its paper states it, with n-grams counted by looking through the texts."""

import numpy as np


def share(texts, before, token: int) -> float:
    """Of what follows `before` in the texts, how much is this token; -1 where nothing does."""
    before, n = list(before), len(before)
    after = [text[i + n] for text in texts for i in range(len(text) - n) if list(text[i : i + n]) == before]
    return after.count(token) / len(after) if after else -1


def row(model, cache, x, order: int) -> np.ndarray:
    """Logits behind a row that enters as a vector."""
    for layer in range(model.cfg.L):
        x = model.rest(layer, x, cache.attend(layer, *model.qkv(layer, x), order))
    return model.logits(x)


def suggested(model, cache, logits, prompt, texts, *, k, top, alpha, weights, temperature, penalty, new, eos=()):
    """[(tokens, mean log-score)] of the best k drafts, best first. cache, logits: of the prompt."""
    V, going, ended = model.cfg.V, [((), 0.0)], []
    for t in range(new):
        p = np.exp((logits - logits.max()) / temperature)
        p[np.argsort(-p, kind="stable")[top:]] = 0
        p /= p.sum()
        score = np.full((len(going), V), -np.inf)
        for d, (tokens, total) in enumerate(going):
            text, q = [*prompt, *tokens], np.zeros(V)
            for token in np.flatnonzero(p):
                for n, w in enumerate(weights, 1):
                    q[token] += w * max(share(texts, text[-n:], token), 0) if n <= len(text) and alpha else 0
            with np.errstate(divide="ignore"):
                own = (1 - alpha) * np.log(p)
                mixed = own + (alpha * np.log(q) if alpha else 0)
            score[d] = total + (mixed if np.isfinite(mixed).any() else own - penalty)
        order = np.argsort(-score, axis=None, kind="stable")[: k * (1 + len(eos))]
        found = [((*going[i // V][0], int(i % V)), score.flat[i]) for i in order if np.isfinite(score.flat[i])]
        ended = sorted(ended + [d for d in found if d[0][-1] in eos], key=lambda d: -d[1])[:k]
        going = [d for d in found if d[0][-1] not in eos][:k]
        if t + 1 < new:
            w = np.exp([total - going[0][1] for _, total in going])
            x = (w / w.sum()) @ np.stack([model.embed(tokens[-1]) for tokens, _ in going])
            logits = row(model, cache, x, len(prompt) + t)
    best = sorted(going + ended, key=lambda d: -d[1] / len(d[0]))[:k]
    return [(tokens, total / len(tokens)) for tokens, total in best]
