"""`Read`: keep every row (or those of a rule), read the ones in any case (first and last rows) and those that a selector names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.kernels import merge
from tokeff.kv.budget import Budget, check_budget, most_rows, rows_of
from tokeff.kv.cache import Room, Rows
from tokeff.kv.coded import check_rule
from tokeff.kv.evidence import Evidence
from tokeff.kv.hosted import Hosted, Store, append, on_host, row_bytes, slots_held, split
from tokeff.kv.policy import Full, Policy, Prefilled, tree_bytes
from tokeff.kv.read import read_draft
from tokeff.models.flow import EMPTY, Accepted, Flow, Here
from tokeff.sparse.gather import flat, orders_at, read_all, read_few
from tokeff.sparse.reuse import Reuse
from tokeff.sparse.select import Last, Readable, Selection, Selector, Span, pages_of, rows_upto, slots_in, slots_of


@dataclass(frozen=True)
class Read(Full):
    """Layers that read everything, layers that select, and layers that read what the nearest selecting layer below them chose.

    budget: rows one query reads in a layer that reads few, the `sinks` first rows and the `recent` last ones (its own included)
    among them, all in whole pages. dense: layers that read everything. select: layers that select, for themselves and for the layers
    above them that do neither; None when every layer that is not dense selects for itself. own: who selects reads what it chose;
    otherwise it reads everything at the steps at which it selects. reuse: how many steps a selection is read for, None for one.
    heads: for every layer, whose selection each of its kv heads reads where another layer selected; None: that of the same number.
    streaming: for every layer, the kv heads that read nothing chosen; None: none do. within: what stays of the prompt, to be chosen from
    (a `Keep` that does not evict); None for all of it. host: in layers that choose by a summary, or read what others chose, the rows lie
    in host memory, and only chosen pages come over.

    Because the recent rows are always read, a draft whose depth is below `recent` sees exactly what one-row decoding would.
    """

    budget: Budget
    selector: Selector
    dense: tuple[int, ...] = (0, 1)
    select: tuple[int, ...] | None = None
    recent: int = 16
    sinks: int = 0
    own: bool = True
    reuse: Reuse | None = None
    heads: tuple[tuple[int, ...], ...] | None = None
    streaming: tuple[tuple[int, ...], ...] | None = None
    within: Policy | None = None
    host: bool = False

    def needs(self) -> tuple[Evidence, ...]:
        more = () if self.within is None else self.within.needs()
        return tuple(dict.fromkeys((*self.selector.needs(), *more)))

    @property
    def chunk(self) -> int | None:  # type: ignore[override]
        return None if self.reuse is None else 1

    def kind(self, layer: int) -> str:
        if layer in self.dense:
            return "dense"
        return "select" if self.select is None or layer in self.select else "read"

    def role(self, layer: int):
        held = None if self.within is None else self.within.role(layer)
        return self.kind(layer), *(lists and lists[layer] for lists in (self.heads, self.streaming)), held

    @property
    def whole(self) -> bool:
        """A share of 1 reads all of the context, and all of what comes."""
        return isinstance(self.budget, float) and self.budget == 1.0

    @property
    def first(self) -> int:
        """Pages of sinks."""
        return pages_of(self.sinks, self.selector.size)

    @property
    def near(self) -> int:
        """Pages that hold the last `recent` rows wherever these begin in a page."""
        return pages_of(self.recent - 1, self.selector.size) + 1 if self.recent else 0

    def far(self, rows):
        """How many pages of a budget of `rows` (a number or one per sequence) are chosen."""
        return (rows - (self.first + self.near) * self.selector.size) // self.selector.size

    def check(self, cfg, length: int) -> None:
        check_budget(self.budget, length)
        self.selector.check(cfg, length)
        if min(self.sinks, self.recent) < 0 or (self.selector.size > 1 and self.recent < 1):
            raise UserError(f"sinks {self.sinks} and recent {self.recent} cannot be negative, and pages need recent=1 or more")
        if self.reuse is not None:
            self.reuse.check(self.recent)
        check_heads(self.heads, self.streaming, cfg)
        if self.within is not None:
            check_rule(self.within)
            self.within.check(cfg, length)
        if self.select and max(self.select) >= cfg.L:
            raise UserError(f"layer {max(self.select)} is to select and {cfg.name} has layers 0 to {cfg.L - 1}; give lower ones in select")
        if self.host and not any(map(self.hosts, range(cfg.L))):
            raise UserError(f"{type(self.selector).__name__} looks at all keys to choose, so none can stay in host memory; leave out host")
        readers = [i for i in range(cfg.L) if self.kind(i) == "read"]
        if readers and (not self.select or min(self.select) > readers[0]):
            raise UserError(f"layer {readers[0]} reads a selection no layer below it makes; add a lower layer to select")
        rows = most_rows(self.budget, length)
        if not self.whole and self.far(rows) < 1:
            size = self.selector.size
            sure = (self.first + self.near) * size
            raise UserError(f"budget of {rows} rows leaves no page of {size} beside {sure} sinks and recent rows; raise it, 1.0 reads all")

    def drafts(self, depth: int) -> str | None:
        if self.reuse is not None:
            return "its selection is read for several steps, which drafts would spread differently; choose anew at every step"
        if depth >= self.recent:
            return f"only the {self.recent} most recent rows are read for sure and drafts are {depth} deep; raise recent"
        return None

    def alone(self, run: tuple[int, ...], cfg) -> str | None:
        readers = [i for i in run if self.kind(i) == "read"]
        chosen = [i for i in run if self.kind(i) == "select"]
        lost = next((i for i in readers if max((s for s in self.select or () if s < i), default=-1) not in chosen), None)
        return None if lost is None else f"layer {lost} reads what a layer chose that the draft leaves out; draft with that one too"

    def by_head(self) -> str | None:
        if self.select is not None:
            return "its layers read what all heads of another layer chose; give select=None"
        if self.heads is not None or self.streaming is not None:
            return "its lists name heads of the whole layer; leave out heads and streaming"
        return self.selector.by_head()

    def hosts(self, layer: int) -> bool:
        """Whether rows of this layer lie on the host: it reads few of them, and looks at none to choose."""
        by_summary = type(self.selector).keys_read is Selector.keys_read and self.own
        return self.host and (self.kind(layer) == "read" or (self.kind(layer) == "select" and by_summary))

    def squeeze(self, rows: Prefilled, here: Here) -> Prefilled:
        return rows if self.within is None else self.within.squeeze(rows, here)

    def pack_layer(self, rows: Prefilled, room: Room, here: Here) -> Readable:  # type: ignore[override]
        whole, rows = rows.most, self.squeeze(rows, here)
        store = super().pack_layer(rows, room, here)
        # The length of the prompt, not of what a pass let through: every layer reads the same number of rows.
        far, far_B = self.far(most_rows(self.budget, whole)), self.far(rows_of(self.budget, rows.length_B))
        if self.whole:
            far = pages_of(store.capacity, self.selector.size)
            far_B = jnp.full_like(far_B, far)
        far, most, summary, last = max(far, 1), rows.order_BKS.shape[2], None, None
        if self.kind(here.layer) == "select":
            summary = self.selector.summary(rows, store, here)
            last = None if self.reuse is None else self.unused(store, far, here)
        return Readable(self.laid(store, most, room, here), far_B, summary, last, far)

    def unused(self, store: Rows, far: int, here: Here) -> Last:
        """Before the first selection."""
        B, K, C = store.order_BKC.shape
        M = min(far, pages_of(C, self.selector.size))
        q = jnp.zeros((B, here.cfg.N, here.cfg.H), store.k_BKCH.dtype)
        return Last(jnp.full((B, K, M), EMPTY, jnp.int32), q, jnp.zeros(B, jnp.int32))

    def laid(self, store: Rows, most: int, room: Room, here: Here) -> Store:
        """The packed rows, at most so many in a sequence, where this layer has them."""
        if not self.hosts(here.layer):
            return store
        R, first = self.selector.size, self.first * self.selector.size
        edge_B = jnp.maximum((store.live_B - self.recent) // R * R, first)
        return split(store, first, edge_B, max((most - self.recent) // R * R, first + R), self.recent + R + room.rows)

    def attend(self, q, k, v, ask: Flow, new: Flow, layer: Readable, accepted: Accepted | None, across, here: Here):
        raw = q
        q, k = here.rotate(q, ask.angle_BT[:, :, None]), here.rotate(k, new.angle_BT[:, :, None])
        most = new.order_BT.shape[1] if new.among_BTW is None or accepted is None else accepted.path_BW.shape[1]
        layer = self.arrived(layer, append(layer.rows, k, v, new, accepted), most, here)
        rows, kind = layer.rows, self.kind(here.layer)
        if kind == "dense":
            return read_all(q, rows, ask, here), layer, across
        if kind == "read":
            order = across.order_BKTM if self.heads is None else across.order_BKTM[:, jnp.asarray(self.heads[here.layer])]
            slot = slots_of(rows.order_BKC, flat(order)).reshape(order.shape)
            return self.read(q, raw, rows, slot, 1, ask, here), layer, across
        page, stale_B, layer = self.selected(self.asking(q, raw, here), raw, layer, ask, here)
        if self.select is not None:
            across = Selection(orders_at(rows.order_BKC, slots_in(page, self.selector.size, rows.capacity)))
        few = partial(self.read, q, raw, rows, page, self.selector.size, ask, here)
        if self.own:
            return few(), layer, across
        everything = partial(read_all, q, rows, ask, here)
        if self.reuse is None:
            return everything(), layer, across
        now = stale_B[:, None, None, None]
        return jax.lax.cond(stale_B.any(), lambda: jnp.where(now, everything(), few()), few), layer, across

    def asking(self, q_BTNH: jax.Array, raw_BTNH: jax.Array, here: Here) -> jax.Array:
        """The queries that choose."""
        return q_BTNH

    def arrived(self, layer: Readable, rows: Store, most: int, here: Here) -> Readable:
        """The layer with rows that came in: at most so many, behind those that were there."""
        summary = layer.summary
        if summary is not None:
            slot = layer.rows.live_B[:, None] + jnp.arange(most)
            summary = self.selector.arrive(summary, rows, jnp.where(slot < rows.live_B[:, None], slot, EMPTY), here)
        return layer.replace(rows=rows, summary=summary)

    def nearest(self, rows: Store, order_BT: jax.Array, ahead: int = 0) -> jax.Array:
        """page_BKT of the first page that is read for being recent, `ahead` rows from here."""
        return rows_upto(rows, order_BT + ahead - self.recent) // self.selector.size

    def selected(self, q, raw, layer: Readable, ask: Flow, here: Here) -> tuple[jax.Array, jax.Array, Readable]:
        """(page_BKTM, stale_B, the layer): chosen now where stale_B, else earlier, where a selection is reused."""
        ahead = 0 if self.reuse is None else min(self.reuse.steps, max(self.recent, 1)) - 1
        span = Span(self.first, self.nearest(layer.rows, ask.order_BT, ahead), here.lo(ask.order_BT))
        if self.reuse is None:
            return self.selector.choose(q, layer, span, here), jnp.ones(ask.order_BT.shape[:1], bool), layer
        last, real_B = layer.last, ask.order_BT[:, 0] != EMPTY
        assert last is not None
        stale_B = real_B & self.reuse.stale(last, raw[:, 0])
        page = jax.lax.cond(stale_B.any(), lambda: self.selector.choose(q, layer, span, here)[:, :, 0], lambda: last.page_BKM)
        now = Last(
            jnp.where(stale_B[:, None, None], page, last.page_BKM),
            jnp.where(stale_B[:, None, None], raw[:, 0].astype(last.q_BNH.dtype), last.q_BNH),
            last.age_B + real_B.astype(jnp.int32),
        )
        return now.page_BKM[:, :, None], stale_B, layer.replace(last=now)

    def read(self, q_BTNH, raw_BTNH, rows: Store, chosen_BKTM: jax.Array, size: int, ask: Flow, here: Here) -> jax.Array:
        """out_BTNH over the first rows, the last ones, the chosen pages of `size` rows that are neither, and drafts."""
        *sure, chosen = self.pages(rows, chosen_BKTM, size, ask, here)
        out, lse = read_few(q_BTNH, rows, jnp.concatenate(sure, axis=-1), chosen, size, ask, here)
        if ask.among_BTW is not None:
            out, _ = merge(out, lse, *read_draft(q_BTNH, rows.draft, ask, here))
        return out

    def pages(self, rows: Store, chosen_BKTM: jax.Array, size: int, ask: Flow, here: Here) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Pages of `size` rows that are read, each at most once: with recent rows, with the first rows, and chosen ones."""
        R, C, order = self.selector.size, rows.capacity, ask.order_BT
        begin, last = self.nearest(rows, order)[..., None], (rows_upto(rows, order)[..., None] - 1) // R
        near, sinks = (jnp.arange(min(n, pages_of(C, R))) for n in (self.near, self.first))
        near, sinks = jnp.where(begin + near <= last, begin + near, EMPTY), jnp.where(sinks < begin, sinks, EMPTY)
        if size != R:
            near, sinks = slots_in(near, R, C), slots_in(sinks, R, C)
        per = R // size
        loose = (chosen_BKTM >= self.first * per) & (chosen_BKTM < begin * per)
        if self.streaming is not None:
            silent = [head in self.streaming[here.layer] for head in range(here.cfg.K)]
            loose = loose & ~jnp.asarray(silent)[:, None, None]
        chosen = jnp.where(loose, chosen_BKTM, EMPTY)
        return near.astype(jnp.int32), sinks.astype(jnp.int32), chosen.astype(jnp.int32)

    def place(self, layers: tuple[Readable, ...]) -> tuple[Readable, ...]:
        return tuple(layer.replace(rows=on_host(layer.rows)) for layer in layers)

    def bytes_moved(self, layer: Readable, here: Here) -> int:
        """Of as many pages as a query may choose, wherever they lie: shapes do not depend on what is chosen."""
        R = self.selector.size
        rows = min(layer.far, pages_of(layer.rows.capacity, R)) * R
        return row_bytes(layer.rows) * rows if isinstance(layer.rows, Hosted) else 0

    def kept(self, layer: Readable) -> jax.Array:
        return layer.rows.order_BKC

    def bytes_read(self, layer: Readable, here: Here) -> int:
        """Every distinct byte once: keys that were looked at to choose are not counted again when they are attended to. With a
        selection for several steps, a step's share of it."""
        whole, C, kind = tree_bytes(layer), layer.rows.capacity, self.kind(here.layer)
        steps = 1 if self.reuse is None else self.reuse.steps
        if kind == "dense" or (kind == "select" and not self.own and steps == 1):
            return whole
        silent = 0 if self.streaming is None else len(self.streaming[here.layer])
        far = layer.far * (here.cfg.K - silent) / here.cfg.K
        rows = min((self.first + self.near + far) * self.selector.size, C)
        summary, row = tree_bytes(layer.summary), row_bytes(layer.rows)
        few = whole - summary - row * (slots_held(layer.rows) - rows)
        if kind == "read":
            return round(few)
        keys = min(rows + self.selector.keys_read(layer), C) - rows
        return round(few + (summary + row / 2 * keys if self.own else whole - few) / steps)


def check_heads(heads, streaming, cfg) -> None:
    """Refuse lists of heads that do not fit the model."""
    for name, lists, each in (("heads", heads, cfg.K), ("streaming", streaming, None)):
        fits = lists is None or (
            len(lists) == cfg.L and all(each in (None, len(some)) and set(some) <= set(range(cfg.K)) for some in lists)
        )
        if not fits:
            raise UserError(f"{name} must list kv heads below {cfg.K} for each of {cfg.L} layers; make the list for {cfg.name}")
