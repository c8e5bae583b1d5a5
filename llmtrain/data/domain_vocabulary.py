"""Domain-aware vocabulary: one per domain, merged and de-duplicated (Pangu Ultra, arXiv 2504.07866, section on the tokenizer).

The paper gives the idea and the final shares per language, not the sizes per domain nor the trainer; the way of merging here is ours:
- Each domain's BPE vocabulary is a list: its characters, then its merges in the order in which they were learnt.
- The domains take turns in proportion to their weights. A turn adds the domain's next piece that is not in the vocabulary yet, so a
  domain's weight is its share of new pieces, and whatever the domains have in common costs nobody twice.
- Taken are thus the beginnings of the domains' lists. A merge stands after those that make its parts in its own domain's list, hence
  also in the joint one, which keeps each list's order; that joint order gives the scores by which sentencepiece merges.
- Domains can still get into each other's way: an earlier merge of one may always eat a part that a merge of another needs. Each piece is
  therefore encoded by the joint model; those that do not come out whole are dropped and the turns continued, until all do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from llmtrain.data.blend import blend_order, whole_shares
from llmtrain.data.errors import DataError
from llmtrain.data.inputs import ReadOptions
from llmtrain.data.train_tokenizer import BYTES, RESERVED, train_bytes, training_lines, write_model


@dataclass(frozen=True)
class Domain:
    """Texts of one domain and its share of the vocabulary."""

    name: str
    inputs: Sequence[str]
    weight: float = 1.0


@dataclass(frozen=True)
class DomainShare:
    """What a domain gave to the joint vocabulary."""

    name: str
    weight: float
    added: int
    """Pieces that it brought in."""
    present: int
    """Pieces of its own vocabulary, cut to the joint one's size, that are in the joint one, whoever brought them."""


@dataclass(frozen=True)
class MergeReport:
    """How the pieces of a joint vocabulary came about; they sum to its size."""

    reserved: int
    """Special pieces, symbols and bytes."""
    domains: tuple[DomainShare, ...]
    dropped: int
    """Pieces passed over because the joint merges never produce them."""


@dataclass(frozen=True)
class _Pieces:
    characters: list[str]
    merges: list[str]

    @property
    def all(self) -> list[str]:
        return self.characters + self.merges


def train_domains(
    domains: Sequence[Domain],
    out: str | Path,
    *,
    vocab_size: int,
    options: ReadOptions | None = None,
    character_coverage: float = 0.9995,
    symbols: Sequence[str] = (),
    max_lines: int = 5_000_000,
) -> MergeReport:
    """Train one BPE vocabulary per domain and write their merger, a sentencepiece model of `vocab_size` pieces, to `out`.

    Arguments as in `train_sentencepiece`; byte fallback is always on.

    Raises:
        DataError: fewer than two domains, two of one name, a weight that is not positive, text too small for the vocabulary.
    """
    _check(domains)
    budget = vocab_size - RESERVED - BYTES - len(symbols)
    models = {}
    for domain in domains:
        models[domain.name] = train_bytes(
            training_lines(domain.inputs, options or ReadOptions()),
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=character_coverage,
            symbols=symbols,
            max_lines=max_lines,
            exact_size=False,
        )
    model, report = merge_models(models, {d.name: d.weight for d in domains}, budget=budget)
    write_model(model, out)
    return report


def _check(domains: Sequence[Domain]) -> None:
    names = [d.name for d in domains]
    if len(domains) < 2:
        raise DataError(f"a domain-aware vocabulary needs two domains or more (--domain NAME=WEIGHT:INPUT), got {len(domains)}")
    for domain in domains:
        if names.count(domain.name) > 1:
            raise DataError(f"--domain {domain.name!r} is given twice; list its inputs after one another, separated by commas")
        if not 0 < domain.weight < float("inf"):
            raise DataError(f"--domain {domain.name!r} has weight {domain.weight}; it must be above 0 and finite")


def merge_models(models: Mapping[str, bytes], weights: Mapping[str, float], *, budget: int) -> tuple[bytes, MergeReport]:
    """Merge serialised BPE models of one kind into one with `budget` pieces beside the reserved ones of the first."""
    lists = {name: _pieces(model) for name, model in models.items()}
    template = next(iter(models.values()))
    shares = whole_shares([weights[name] for name in models])
    dropped: set[str] = set()
    while True:  # each round drops pieces of finite lists
        origin = _take_turns(lists, shares, budget=budget, dropped=dropped)
        model = _assemble(template, lists, list(origin))
        lost = _unreachable(model, [p for p in origin if len(p) > 1])
        if not lost:
            break
        dropped |= lost
    reserved = _size(model) - len(origin)
    own = {name: set(islice(pieces.all, budget)) for name, pieces in lists.items()}
    report = [
        DomainShare(name, weights[name], sum(o == i for o in origin.values()), len(own[name] & origin.keys()))
        for i, name in enumerate(models)
    ]
    return model, MergeReport(reserved, tuple(report), len(dropped))


def _take_turns(lists: Mapping[str, _Pieces], shares: list[int], *, budget: int, dropped: set[str]) -> dict[str, int]:
    """Piece -> number of the domain that brought it in, in the order of coming in."""
    origin: dict[str, int] = {}
    rest = [iter(pieces.all) for pieces in lists.values()]
    empty: set[int] = set()
    period = blend_order(shares, min(sum(shares), 1 << 20)).tolist()
    while len(origin) < budget:
        for k in period:
            piece = next((p for p in rest[k] if p not in origin and p not in dropped), None)
            if piece is None:
                empty.add(k)
            else:
                origin[piece] = k
            if len(origin) == budget or len(empty) == len(rest):
                break
        if len(empty) == len(rest) and len(origin) < budget:
            raise DataError(
                f"--vocab-size is {budget - len(origin)} pieces more than the domains' texts can fill together; lower it or give more text"
            )
    return origin


def _proto() -> type:
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError as error:
        raise DataError(f"merging vocabularies needs the package protobuf ({error}): pip install protobuf") from error
    except Exception as error:  # protobuf raises a class of its own where it is older than sentencepiece's generated code
        raise DataError(f"merging vocabularies needs a newer protobuf ({error}): pip install --upgrade protobuf") from error
    return ModelProto


def _pieces(model: bytes) -> _Pieces:
    proto = _proto().FromString(model)
    normal = [p.piece for p in sorted(proto.pieces, key=lambda p: -p.score) if p.type == p.NORMAL]
    return _Pieces([p for p in normal if len(p) == 1], [p for p in normal if len(p) > 1])


def _assemble(template: bytes, lists: Mapping[str, _Pieces], pieces: list[str]) -> bytes:
    """A model with these pieces: merges first, scored by their place, then characters, as sentencepiece orders its own."""
    proto = _proto().FromString(template)
    kept = [p for p in proto.pieces if p.type != p.NORMAL]
    ordered = [p for p in pieces if len(p) > 1] + [p for p in pieces if len(p) == 1]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    for place, piece in enumerate(ordered):
        proto.pieces.add(piece=piece, score=-float(place), type=proto.SentencePiece.NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString(deterministic=True)


def _size(model: bytes) -> int:
    return len(_proto().FromString(model).pieces)


def _unreachable(model: bytes, pieces: Sequence[str]) -> set[str]:
    """Pieces whose own text the model does not encode as that one piece."""
    from sentencepiece import SentencePieceProcessor

    coder = SentencePieceProcessor(model_proto=model)
    texts = [p.replace("\u2581", " ") for p in pieces]
    return {piece for piece, got in zip(pieces, coder.encode(texts, out_type=str)) if got != [piece]}
