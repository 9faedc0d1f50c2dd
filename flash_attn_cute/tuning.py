"""Tile shapes and pipeline depths, each with its reason.

The number of keys in a KV tile is one constant a (architecture, head_dim, head_dim_v): nothing about a batch, a mask or
a launch may change it, because it decides which keys meet in one partial sum (batch invariance). Rows of a query tile
never meet, so tile_m is free.
"""

from __future__ import annotations

from typing import NamedTuple

SMEM_BYTES = 227 * 1024  # of a CTA, on Hopper and on Blackwell
SM90_SMALL_BYTES = 512  # barriers and the tile mailbox
# Of an SM's memory, what the driver gives to shared memory on Hopper: the least that holds the CTAs of a launch, each
# with 1 KiB beside what it asks for.
SM90_CARVE_OUTS = tuple(kib * 1024 for kib in (132, 164, 196, 228))
# Staged KV tiles of a key-side bias: the one that is added, and the next.
BIAS_STAGES = 2
# Of a CTA's shared memory on Blackwell: the barriers of a key-side bias.
SM100_BIAS_BARRIERS = 256


class Sm90Tile(NamedTuple):
    """Shape of the work of one CTA. `consumers` warpgroups take 64 query rows each."""

    consumers: int
    tile_n: int
    kv_stages: int
    q_stages: int
    head_dim: int  # padded: what the tiles hold
    head_dim_v: int

    @property
    def tile_m(self) -> int:
        return 64 * self.consumers

    @property
    def query_rows(self) -> int:
        """Rows that are loaded and multiplied together: whole tokens have to fit into them."""
        return self.tile_m

    @property
    def scheduler_keeps_sequences(self) -> bool:
        """Whether the scheduling warp has registers to spare: 96 beside one consumer, otherwise 40 at most."""
        return self.consumers == 1

    @property
    def leaves_room_for_merge(self) -> bool:
        """Whether a CTA of the merge finds registers beside one of this tile (`launch_bound`), and, but for the largest
        biases, shared memory (`smem_beside_merge`)."""
        return self.consumers == 1

    @property
    def launch_bound(self) -> int:
        """Threads that a launch is compiled for, which decides the registers that each is launched with.

        With one consumer it is more than there are, so that a third of the registers stays free: CTAs of the merge,
        launched as dependents, then wait on the SMs instead of for them.
        """
        return 128 * (max(self.consumers, 2) + 1)

    def registers(self, producer_computes: bool) -> tuple[int, int]:
        """(producer, consumer) registers a thread after reallocation: those of the launch divided by the warpgroups, in
        steps of 8. producer_computes: whether it has to, an address a row or a bias a key."""
        if producer_computes:
            return {1: (96, 240), 2: (40, 232), 3: (32, 160)}[self.consumers]
        return {1: (96, 240), 2: (24, 240), 3: (32, 160)}[self.consumers]

    def smem_beside_merge(self, bias_vectors: int) -> int | None:
        """Bytes of shared memory to launch with, so that CTAs of the merge find some beside it; None: what is used.

        As much as a carve-out is more than it holds, and takes the next, which leaves 31 KiB.
        """
        used = self.smem_bytes + SM90_SMALL_BYTES + bias_bytes(self, bias_vectors)
        return next((size for size in SM90_CARVE_OUTS[:-1] if used <= size), None)

    @property
    def bias_pad(self) -> int:
        """Numbers between the staged vectors of a bias: 8 lanes read pairs of columns of 4 of them at a time."""
        return 8

    def beside_bias(self, vectors: int) -> Sm90Tile | None:
        """The tile where `vectors` numbers a key are staged, or None where there is no room for them."""
        bytes_of_others = self.smem_bytes + SM90_SMALL_BYTES
        return self if bytes_of_others + bias_bytes(self, vectors) <= SMEM_BYTES else None

    @property
    def smem_bytes(self) -> int:
        q = self.tile_m * self.head_dim * self.q_stages
        kv = self.tile_n * (self.head_dim + self.head_dim_v) * self.kv_stages
        return 2 * (q + kv)


SM90_TILES = {
    # d64: the exponentials bind, not the products; a third warpgroup gives the scheduler one more to hide them behind.
    (64, 64): Sm90Tile(3, 128, 2, 2, 64, 64),
    (96, 96): Sm90Tile(2, 128, 2, 2, 96, 96),
    # d128: 128 keys divide causal blocks evenly, and leave room for a second Q stage, so the next tile's queries are
    # there when its first product starts.
    (128, 128): Sm90Tile(2, 128, 2, 2, 128, 128),
    # From here on shared memory decides: the most keys with two stages of each operand.
    (192, 128): Sm90Tile(2, 128, 2, 1, 192, 128),
    (192, 192): Sm90Tile(2, 112, 2, 1, 192, 192),
    (256, 256): Sm90Tile(2, 80, 2, 1, 256, 256),
}


# Query tiles of at most 64 rows, as decoding has, with one consumer. They are bound by memory, and 128 KiB of keys
# and values on their way to each SM cover its latency. More is worse: on an H200, 64 sequences of 8192 keys took 469 us
# with two stages and 476 with three (2026-11-21): the heads of a sequence, whose keys share DRAM pages, drift apart.
SM90_FEW_ROWS_TILES = {
    dims: SM90_TILES[dims]._replace(consumers=1, kv_stages=kv_stages)
    for dims, kv_stages in {
        (64, 64): 4,
        (96, 96): 3,
        (128, 128): 2,
        (192, 128): 2,
        (192, 192): 2,
        (256, 256): 2,
    }.items()
}


class Sm100Tile(NamedTuple):
    """Shape of the work of one CTA: `query_tiles` tiles of 128 query rows in flight, each with a softmax warpgroup.

    Keys and values share one ring of stages. A stage takes `k_columns` columns of a K tile or `v_rows` rows of a V
    tile, which are pieces of the dimension that its product sums over.
    """

    query_tiles: int
    tile_n: int
    k_columns: int
    v_rows: int
    kv_stages: int
    polynomial_pairs: int  # of 16 pairs of columns, those whose exponentials are polynomials
    head_dim: int  # padded: what the tiles hold
    head_dim_v: int

    @property
    def scheduler_keeps_sequences(self) -> bool:
        return False

    @property
    def leaves_room_for_merge(self) -> bool:
        return False

    @property
    def query_rows(self) -> int:
        return 128

    @property
    def tile_m(self) -> int:
        return self.query_rows * self.query_tiles

    @property
    def score_buffers(self) -> int:
        """Of each query tile. A query tile alone needs two, or the tensor cores would wait for its softmax."""
        return 2 // self.query_tiles

    @property
    def output_over_queries(self) -> bool:
        """Whether outputs are staged where the queries were, for want of shared memory."""
        return self.smem_bytes_with_output > SMEM_BYTES - SM100_SMALL_BYTES

    @property
    def k_pieces(self) -> int:
        return self.head_dim // self.k_columns

    @property
    def v_pieces(self) -> int:
        return self.tile_n // self.v_rows

    @property
    def stage_elements(self) -> int:
        return max(self.tile_n * self.k_columns, self.v_rows * self.head_dim_v)

    @property
    def smem_bytes_with_output(self) -> int:
        output = self.tile_m * self.head_dim_v
        return 2 * (self.tile_m * self.head_dim + output + self.kv_stages * self.stage_elements)

    @property
    def smem_bytes(self) -> int:
        """Of queries, keys, values and outputs."""
        output = 2 * self.tile_m * self.head_dim_v
        return self.smem_bytes_with_output - (output if self.output_over_queries else 0)

    @property
    def output_column(self) -> int:
        """Where outputs begin in tensor memory, behind the two score buffers."""
        return 2 * self.tile_n

    @property
    def tensor_memory_columns(self) -> int:
        return self.output_column + self.query_tiles * self.head_dim_v

    @property
    def registers(self) -> tuple[int, int, int]:
        """(softmax, correction, other) registers a thread after reallocation, of 64 K in all: a softmax thread holds a
        row of 128 scores."""
        return {2: (200, 72, 40), 1: (232, 168, 104)}[self.query_tiles]

    @property
    def registers_beside_bias(self) -> tuple[int, int, int, int]:
        """The same, and those of the warpgroup that stages a key-side bias."""
        return {2: (192, 40, 56, 32), 1: (232, 128, 72, 72)}[self.query_tiles]

    @property
    def registers_beside_bias_of_queries(self) -> tuple[int, int, int]:
        """As `registers`, where a softmax thread also has to know where a mask and a bias of its row lie, and none of
        keys is staged: at 200 it spilled 8 registers."""
        return {2: (216, 40, 40), 1: (232, 168, 104)}[self.query_tiles]

    @property
    def bias_pad(self) -> int:
        """Numbers between the staged vectors of a bias: 8 lanes read 4 columns of 8 of them at a time."""
        return 4

    def beside_bias(self, vectors: int) -> Sm100Tile | None:
        """The tile where `vectors` numbers a key are staged, or None where there is no room for them.

        Stages of keys and values make room, as long as more of them stay than are in use at one time. Pieces are
        summed in the same order whatever their size, so that this changes no bit.
        """
        most = SMEM_BYTES - SM100_SMALL_BYTES - SM100_BIAS_BARRIERS - bias_bytes(self, vectors)
        if (self.head_dim, self.head_dim_v) == (128, 128):
            # Whole tiles leave no stage to give. Pieces of 16 KiB, with outputs over queries: 4 in use, 5 on their way.
            self = self._replace(k_columns=64, v_rows=64, kv_stages=9)
        stages = range(self.kv_stages, self.k_pieces + self.v_pieces, -1)
        tiles = (self._replace(kv_stages=count) for count in stages)
        return next((tile for tile in tiles if tile.smem_bytes <= most), None)


def bias_bytes(tile: Sm90Tile | Sm100Tile, vectors: int) -> int:
    """Shared memory of a staged key-side bias; see device.key_bias."""
    return 4 * (tile.tile_n + tile.bias_pad) * vectors * BIAS_STAGES


# Barriers, factors of rows and the tile mailbox.
SM100_SMALL_BYTES = 5 * 1024 // 2


def _two_query_tiles(
    head_dim: int, head_dim_v: int, k_columns: int, v_rows: int, kv_stages: int, polynomial_pairs: int
) -> Sm100Tile:
    return Sm100Tile(2, 128, k_columns, v_rows, kv_stages, polynomial_pairs, head_dim, head_dim_v)


def _one_query_tile(head_dim: int, kv_stages: int) -> Sm100Tile:
    # Pieces of 16 KiB. No polynomials: the products of a step take 1536 cycles or more, its exponentials 1024.
    return Sm100Tile(1, 128, 64, 32, kv_stages, 0, head_dim, head_dim)


# Polynomials, of 16 pairs of columns. A 128x128 tile has 16384 exponentials: 1024 cycles of the special function units
# at 16 a cycle, less 64 for each pair of the 16 that goes through the FMA pipe instead, which costs 36 issue slots of
# each scheduler. 4 leave 776 cycles of special functions beside about 750 issue slots (counted, csrc_notes): either
# more or fewer would make one of the two the longer. They are also what lets one softmax end within the products of the
# other query tile (1024 cycles at d128), with which it alternates; (192, 128) has 1280 cycles for that, and needs 2.
SM100_TILES = {
    (64, 64): _two_query_tiles(64, 64, k_columns=64, v_rows=128, kv_stages=6, polynomial_pairs=4),
    (96, 96): _two_query_tiles(96, 96, k_columns=96, v_rows=128, kv_stages=5, polynomial_pairs=4),
    # Three stages: the values and keys in use, and what comes next.
    (128, 128): _two_query_tiles(128, 128, k_columns=128, v_rows=128, kv_stages=3, polynomial_pairs=4),
    # Pieces of 16 KiB, of which 5 are in use and 3 on their way: whole tiles would leave no room for a third.
    (192, 128): _two_query_tiles(192, 128, k_columns=64, v_rows=64, kv_stages=8, polynomial_pairs=2),
    # Two outputs of these do not fit into tensor memory.
    (192, 192): _one_query_tile(192, kv_stages=11),
    (256, 256): _one_query_tile(256, kv_stages=10),
}

# Blackwell Ultra has twice the exponentials a cycle: no polynomial pays.
SM103_TILES = {dims: tile._replace(polynomial_pairs=0) for dims, tile in SM100_TILES.items()}

_TILES = {"sm_90a": SM90_TILES, "sm_100a": SM100_TILES, "sm_103a": SM103_TILES}
_FEW_ROWS_TILES = {"sm_90a": SM90_FEW_ROWS_TILES}


def forward_tile(
    architecture: str, head_dim: int, head_dim_v: int, few_rows: bool = False
) -> Sm90Tile | Sm100Tile | None:
    """The tile for head dimensions, rounded up to the next pair that has one, or None where there is no kernel.

    few_rows: where there is a smaller one, that. It has as many keys, so a row's bits are the same.
    """
    tiles = _TILES[architecture]
    if few_rows:
        tiles = _FEW_ROWS_TILES.get(architecture, tiles)
    if head_dim == head_dim_v:
        for padded in (64, 96, 128, 192, 256):
            if head_dim <= padded and (padded, padded) in tiles:
                return tiles[(padded, padded)]
    return tiles.get((head_dim, head_dim_v))


class QueryTiling(NamedTuple):
    """How the queries of a call are divided into tiles."""

    tile: Sm90Tile | Sm100Tile
    rows_per_token: int  # 1: query heads are not packed; 0: they cannot be
    few_rows: bool  # whether `tile` is the smaller one

    @property
    def packed(self) -> bool:
        return self.rows_per_token > 1

    @property
    def tokens_per_tile(self) -> int:
        return self.tile.tile_m // self.rows_per_token


def query_tiling(
    architecture: str,
    head_dim: int,
    head_dim_v: int,
    qheads_per_kvhead: int,
    pack_gqa: bool | None,
    mean_seqlen_q: float,
    max_seqlen_q: int,
    tokens_per_tile: int | None = None,
) -> QueryTiling | None:
    """Decides packing where it is left open, and the tile; None where there is no kernel for the head dimensions.

    max_seqlen_q: a bound on the queries of a sequence. It chooses between tiles that compute the same bits.
    tokens_per_tile: of a plan that has been made already, which then decides instead.
    """
    tile = forward_tile(architecture, head_dim, head_dim_v)
    if tile is None:
        return None
    if pack_gqa is None:
        pack_gqa = packs_heads(qheads_per_kvhead, mean_seqlen_q, tile.query_rows)
    packed = pack_gqa and qheads_per_kvhead > 1

    def tiling(few_rows: bool) -> QueryTiling:
        tile = forward_tile(architecture, head_dim, head_dim_v, few_rows)
        return QueryTiling(tile, packed_rows(qheads_per_kvhead, tile.query_rows) if packed else 1, few_rows)

    regular, smaller = tiling(False), tiling(True)
    if smaller.tile is tile or smaller.rows_per_token == 0:
        return regular
    if tokens_per_tile is not None:
        return smaller if smaller.tokens_per_tile == tokens_per_tile else regular
    return smaller if max_seqlen_q <= smaller.tokens_per_tile else regular


def packed_rows(qheads_per_kvhead: int, tile_m: int) -> int:
    """Rows of a query tile that one token takes when its query heads are packed: the least divisor of tile_m that holds
    them, so that a tile holds whole tokens and one TMA box loads it; rows past the real heads are computed and
    dropped."""
    return next((d for d in range(qheads_per_kvhead, tile_m + 1) if tile_m % d == 0), 0)


def section_of_tiles(num_sms: int) -> tuple[int, int]:
    """(least heads, most tiles) of a section of the longest-first order: see tile_scheduler.TileOrder.

    About 8 query tiles in flight share each head's keys, so memory is read at an eighth of the rate at which L2 is;
    short sequences take as many heads as give every SM a few tiles, so that the shortest come last.
    """
    return max(num_sms // 8, 1), 4 * num_sms


# Finer splits end closer together: a decode of 131072 keys, 32/8 heads, in 64 splits and not 16 takes the Hopper
# forward 123.8 us instead of 125.7. With more rows to merge, that costs more than it saves (csrc_notes/scheduling.md);
# and the workspace has room for whole tiles, so those have 64 rows.
FINE_GRANULARITY, GRANULARITY = 4, 2
FEW_ROWS_TO_MERGE = 16


def granularity_of_splits(tile: Sm90Tile | Sm100Tile, rows: int) -> int:
    """plan.PlanParameters.granularity. rows: the most of a work tile that are queries."""
    return FINE_GRANULARITY if tile.tile_m <= 64 and rows <= FEW_ROWS_TO_MERGE else GRANULARITY


def packs_heads(qheads_per_kvhead: int, mean_seqlen_q: float, tile_m: int) -> bool:
    """Whether to pack the query heads of a KV head into the query tile, where the caller leaves it open.

    Packing fills tiles of short sequences, and reads keys once for the whole group; rows that pad a group to a divisor
    of the tile are wasted. Neither changes any output bit.
    """
    rows = packed_rows(qheads_per_kvhead, tile_m)
    if rows == 0 or qheads_per_kvhead == 1:
        return False

    def fill(rows_per_token: int) -> float:
        used = mean_seqlen_q * rows_per_token
        return used / (-(-used // tile_m) * tile_m) if used else 1.0

    return fill(rows) * qheads_per_kvhead / rows >= fill(1)


# Columns of a row that a lane merges at once, by the warps that share them. Where there are many splits, a row is cut
# into blocks of columns, so that as many SMs load it: 64 rows of 128 splits are 4 MiB.
MERGE_LANE_COLUMNS = {1: 4, 4: 2}


def merge_blocks(head_dim_v: int, warps_per_row: int) -> int:
    """Blocks of columns that a row is merged in."""
    return 1 if warps_per_row == 1 else -(-head_dim_v // (32 * MERGE_LANE_COLUMNS[warps_per_row]))


# Tiles of so few keys that finding the next one takes about as long as computing it are handed out CLAIM at a time: one
# search and one atomic for all, and the query heads of a KV head, which follow each other, find its keys in L2.
SHORT_KEYS = 256
CLAIM = 4
# Claims for every SM, so that handing out several tiles at once leaves nobody without work at the end.
CLAIMS_AN_SM = 8


def tiles_are_short(max_seqlen_k: int | None, num_tiles: int, num_sms: int) -> bool:
    return max_seqlen_k is not None and max_seqlen_k <= SHORT_KEYS and num_tiles >= CLAIM * CLAIMS_AN_SM * num_sms
