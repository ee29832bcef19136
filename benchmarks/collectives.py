"""What devices say to each other in a compiled program: every collective, its bytes.

A scanned layer is written once and runs many times, so each collective is counted as
often as the loops around it turn.
"""

import collections
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax

# Bytes that one device receives in a ring of g, as a multiple of the larger side of the
# operation: what comes out of an all-gather, what goes into every other one. A permute
# has no ring; a device receives one whole operand.
RECEIVED = {
  "all-gather": lambda g: (g - 1) / g,
  "all-reduce": lambda g: 2 * (g - 1) / g,
  "reduce-scatter": lambda g: (g - 1) / g,
  "all-to-all": lambda g: (g - 1) / g,
  "collective-permute": lambda g: 1.0,
}
# Not counted, and refused, since nobody has said what they cost.
OTHERS = ("collective-broadcast", "ragged-all-to-all")

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SCALAR = re.compile(r"^\w+\[\]\S* constant\((-?\d+)\)")


@dataclass(frozen=True)
class Collective:
  """One instruction.

  bytes: what one device receives of it each time, by `RECEIVED`. arrays: shapes as HLO
  writes them, of the larger side. group_size: devices that talk to each other, 2 where
  one only passes on. trips: how often it runs in a call of the program. where: the JAX
  operation it came from, and its name.
  """

  kind: str
  bytes: float
  arrays: tuple[str, ...]
  group_size: int
  trips: int
  where: str

  @property
  def total(self) -> float:
    """Bytes that one device receives in a call of the program."""
    return self.bytes * self.trips


@dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  opcode: str
  operands: str
  rest: str


def count(compiled: jax.stages.Compiled) -> list[Collective]:
  """Every collective of a compiled program; ValueError where a loop has no count."""
  return count_text(compiled.as_text() or "")


def count_text(hlo: str) -> list[Collective]:
  """The same from the text of an optimised HLO module."""
  entry, computations = _parse(hlo)
  found: list[Collective] = []
  for name, trips in _calls(entry, computations).items():
    # An instruction names its operands, not their shapes.
    types = {i.name: i.type for i in computations[name]}
    found += [
      _collective(instruction, types, trips)
      for instruction in computations[name]
      if _kind(instruction)
    ]
  return [c for c in found if c.group_size > 1]


def by_kind(found: Iterable[Collective]) -> dict[str, float]:
  """Bytes that one device receives in a call of the program, by kind."""
  totals: dict[str, float] = collections.defaultdict(float)
  for collective in found:
    totals[collective.kind] += collective.total
  return dict(totals)


def table(found: Sequence[Collective]) -> str:
  """Text, largest first."""
  head = f"{'MB received':>12}  {'trips':>5}  {'group':>5}  kind and arrays"
  rows = [
    f"{c.total / 1e6:12.4f}  {c.trips:5d}  {c.group_size:5d}  {c.kind} "
    f"{', '.join(c.arrays)}  {c.where}"
    for c in sorted(found, key=lambda c: -c.total)
  ]
  return "\n".join([head, *rows])


def _parse(hlo: str) -> tuple[str, dict[str, list[_Instruction]]]:
  """Name of the entry computation, and the instructions of every computation."""
  computations: dict[str, list[_Instruction]] = {}
  entry, body = "", []
  for line in hlo.splitlines():
    if match := _COMPUTATION.match(line):
      body = computations.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif match := _INSTRUCTION.match(line):
      body.append(_instruction(match[1], match[2]))
  if not entry:
    raise ValueError("no ENTRY computation: this is not the text of an HLO module")
  return entry, computations


def _instruction(name: str, text: str) -> _Instruction:
  """`TYPE opcode(operands), attributes`; a TYPE may be a tuple with brackets inside."""
  type_end = _closing(text, 0) + 1 if text[0] == "(" else text.index(" ")
  opening = text.index("(", type_end)
  closing = _closing(text, opening)
  return _Instruction(
    name,
    text[:type_end],
    text[type_end:opening].strip(),
    text[opening + 1 : closing],
    text[closing + 1 :],
  )


def _closing(text: str, opening: int) -> int:
  depth = 0
  for i in range(opening, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if not depth:
      return i
  raise ValueError(f"brackets do not match in {text[:80]!r}")


def _calls(
  entry: str, computations: Mapping[str, list[_Instruction]]
) -> dict[str, int]:
  """How often each computation runs in one run of the entry.

  Every branch of a conditional is counted as taken.
  """
  runs: dict[str, int] = collections.defaultdict(int)

  def visit(name: str, times: int) -> None:
    runs[name] += times
    for instruction in computations[name]:
      if _kind(instruction) or instruction.opcode.endswith(("-update", "-done")):
        continue  # what a collective calls adds two numbers; an end calls nothing new
      called = [name for _, name in _CALLED.findall(instruction.rest)]
      for branches in _BRANCHES.findall(instruction.rest):
        called += [branch.strip().lstrip("%") for branch in branches.split(",")]
      inner = times
      if instruction.opcode == "while":
        inner *= _trips(instruction, computations)
      for callee in called:
        visit(callee, inner)

  visit(entry, 1)
  return dict(runs)


def _trips(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> int:
  """Turns of a while loop: what XLA found out, else the bound that it is held to."""
  if known := _TRIPS.search(loop.rest):
    return int(known[1])
  condition = dict(_CALLED.findall(loop.rest))["condition"]
  bounds = [
    int(match[1])
    for i in computations[condition]
    if i.opcode == "constant"
    and (match := _SCALAR.match(f"{i.type} constant({i.operands})"))
  ]
  if len(bounds) != 1:
    raise ValueError(f"cannot tell how often the loop {loop.name} turns")
  return bounds[0]


def _kind(instruction: _Instruction) -> str:
  """The kind of a collective, empty for anything else and for the end of one."""
  opcode = instruction.opcode.removesuffix("-start")
  if opcode in OTHERS:
    raise ValueError(f"{instruction.name} is a {opcode}, whose bytes are not known")
  return opcode if opcode in RECEIVED else ""


def _collective(
  instruction: _Instruction, types: Mapping[str, str], trips: int
) -> Collective:
  kind = _kind(instruction)
  if kind == "all-gather":
    arrays = _ARRAY.findall(instruction.type)
    if instruction.opcode.endswith("-start"):  # (operands, results)
      arrays = arrays[len(arrays) // 2 :]
  else:
    names = re.findall(r"%?([\w.\-]+)(?:,|$)", _uncommented(instruction.operands))
    arrays = [array for name in names for array in _ARRAY.findall(types[name])]
  size = _group_size(instruction)
  return Collective(
    kind,
    RECEIVED[kind](size) * sum(_bytes(*array) for array in arrays),
    tuple(f"{dtype}[{shape}]" for dtype, shape in arrays),
    size,
    trips,
    " ".join([*re.findall(r'op_name="([^"]*)"', instruction.rest), instruction.name]),
  )


def _uncommented(text: str) -> str:
  return re.sub(r"/\*.*?\*/", "", text)


def _bytes(dtype: str, shape: str) -> float:
  bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or "0")[0])
  return bits / 8 * math.prod(int(n) for n in shape.split(",") if n)


def _group_size(instruction: _Instruction) -> int:
  """Devices that talk to each other: the three ways in which HLO writes groups."""
  rest = instruction.rest
  if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", rest):
    moved = [a != b for a, b in re.findall(r"(\d+),(\d+)", pairs[1])]
    return 2 if any(moved) else 1
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return len(listed[1].split(","))
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
    return int(iota[2])
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", rest):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
  raise ValueError(f"{instruction.name} has groups that this cannot read: {rest[:200]}")
