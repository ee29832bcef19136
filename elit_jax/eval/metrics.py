"""FID, sFID, inception score, precision, recall and their like, from features.

FID, sFID, IS, precision and recall are those of the ADM evaluator (Dhariwal & Nichol
2021). Two of its roundings are not: it takes distances for precision and recall in
fp16 where they fit (ours are fp32), and softmax in fp32 (ours is float64).

Standard errors come from a bootstrap, and say how much a value would vary if as many
samples were drawn again from the same model and compared with the same reference. What
stays the same in that is not in them: the bias that FID has at a finite number of
samples (it falls as 1 / N, so compare equal numbers), the choice of the reference, the
extractor. Recall alone counts reference images, so its error is that of drawing those
again, with the samples' balls as they are.

Letters: N samples, M reference images, E features, C classes, R replicates.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from elit_jax.errors import ConfigError, lookup
from elit_jax.eval import neighbours, threads
from elit_jax.eval.moments import frechet, frechet_replicates
from elit_jax.eval.statistics import Statistics, check_same_extractor

# Samples of a split, of which inception scores are averaged; the last one may have
# fewer, and counts as much.
SPLIT = 5000
# KID's: the mean over so many subsets of so many samples and reference images.
SUBSETS, SUBSET = 100, 1000
# A replicate of a Frechet distance draws groups of samples, whose sums are kept, and
# takes a spectrum; replicates of everything else draw samples, and cost little.
GROUPS = 50
REPLICATES = 200


class Value(NamedTuple):
  """A metric's value, its standard error (None if not asked for, or if the samples are
  known by their moments alone) and the number of samples, None if nobody knows.
  """

  value: float
  standard_error: float | None
  n: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
  """One output of samples, beside that of the reference, and what metrics share.

  bootstrap: replicates of a Frechet distance; 0 for no errors at all.
  """

  sample: Statistics
  reference: Statistics | None
  output: str
  bootstrap: int
  seed: int

  @property
  def sample_NE(self) -> np.ndarray:
    return self.sample.feature(self.output)

  @property
  def reference_ME(self) -> np.ndarray:
    assert self.reference is not None
    return self.reference.feature(self.output)

  @functools.cached_property
  def inside(self) -> neighbours.Inside:
    """The costly part of precision and of recall is the same."""
    return neighbours.inside(self.sample_NE, self.reference_ME)

  def times(self, count: int, replicates: int = REPLICATES) -> np.ndarray:
    """How often each of `count` things is drawn: (1 + R, count), the first row once.

    R = 0 where no errors are asked for. The generator is old, but numpy promises never
    to change it.
    """
    rng = np.random.RandomState([self.seed, 1])
    times_RN = np.ones((1 + (replicates if self.bootstrap else 0), count))
    for row_N in times_RN[1:]:
      row_N[:] = np.bincount(rng.randint(0, count, count), minlength=count)
    return times_RN

  def value(self, values_R: np.ndarray) -> Value:
    """Of the samples as they are, which come first, and of replicates."""
    again_R = values_R[1:][np.isfinite(values_R[1:])]
    error = float(np.std(again_R, ddof=1)) if len(again_R) > 1 else None
    return Value(float(values_R[0]), error, len(self.sample_NE))


# --- the metrics ----------------------------------------------------------------------


def _frechet(pair: Pair) -> Value:
  assert pair.reference is not None
  own = pair.sample.gaussian(pair.output)
  reference = pair.reference.gaussian(pair.output)
  value = frechet(own, reference)
  # Moments may have come without features, or be of other images than those.
  x_NE = pair.sample.features.get(pair.output)
  if x_NE is None or own.count != len(x_NE) or not pair.bootstrap:
    return Value(value, None, own.count)
  groups = min(GROUPS, len(x_NE))
  times_RG = pair.times(groups, pair.bootstrap)[1:]
  group_N = groups_of(len(x_NE), groups, pair.sample.in_turn, pair.seed)
  replicates = frechet_replicates(x_NE, reference, group_N, times_RG)
  return pair.value(np.append(value, replicates))


def groups_of(count: int, groups: int, in_turn: bool, seed: int) -> np.ndarray:
  """Which of so many groups each sample is of (N,): successive samples share one if
  classes come in turn, so that each group is balanced; else it is drawn.

  Groups of one class each would make every replicate another mixture of classes.
  """
  place_N = np.arange(count)
  if not in_turn:
    np.random.RandomState([seed, 2]).shuffle(place_N)
  return place_N * groups // count


def _inception_score(pair: Pair, epsilon: float = 0.0) -> Value:
  times_RN = pair.times(len(pair.sample_NE))
  return pair.value(inception_scores(pair.sample_NE, SPLIT, epsilon, times_RN))


def inception_scores(
  logits_NC: np.ndarray,
  split: int = SPLIT,
  epsilon: float = 0.0,
  times_RN: np.ndarray | None = None,
) -> np.ndarray:
  """Mean over splits of exp(mean KL(p(y|x) || p(y))), of logits without their bias.

  Splits are successive; what is left over is one, too. `epsilon` is added within
  logarithms, which ELIT's evaluator does by 1e-10. `times_RN` says how often each
  sample counts (once), and there are R scores, NaN where a split was left empty.
  """
  if times_RN is None:
    times_RN = np.ones((1, len(logits_NC)))
  scores = []
  for start in range(0, len(logits_NC), split):
    part = slice(start, start + split)
    p_NC = softmax(logits_NC[part])
    # The mean of sum p log p(y) over samples is sum p(y) log p(y).
    with np.errstate(invalid="ignore"):
      share_RN = times_RN[:, part] / times_RN[:, part].sum(axis=1, keepdims=True)
    own_N = _p_log_p(p_NC, epsilon).sum(axis=1)
    all_R = _p_log_p(share_RN @ p_NC, epsilon).sum(axis=1)
    scores.append(np.exp(share_RN @ own_N - all_R))
  return np.mean(scores, axis=0)


def softmax(logits_NC: np.ndarray) -> np.ndarray:
  """Probabilities (N, C) in float64."""
  shifted_NC = np.asarray(logits_NC, np.float64)
  p_NC = np.exp(shifted_NC - shifted_NC.max(axis=1, keepdims=True))
  return p_NC / p_NC.sum(axis=1, keepdims=True)


def _p_log_p(p: np.ndarray, epsilon: float) -> np.ndarray:
  """p log(p + epsilon), which is 0 where p is."""
  return p * np.log(np.maximum(p + epsilon, np.finfo(np.float64).tiny))


def _share(of: Callable[[neighbours.Inside], np.ndarray]) -> Callable[[Pair], Value]:
  """The share of those flags that are set."""
  return lambda pair: _mean(pair, of(pair.inside).astype(np.float64))


def _mean(pair: Pair, values_N: np.ndarray) -> Value:
  """The mean of what is known of each."""
  return pair.value(pair.times(len(values_N)) @ values_N / len(values_N))


def _saturation(pair: Pair) -> Value:
  return _mean(pair, pair.sample_NE[:, 0].astype(np.float64))


def saturation(images_BHWC: np.ndarray) -> np.ndarray:
  """Mean HSL saturation (B, 1) of each image, in 0 to 1; 0 of grey ones.

  Images are uint8, or floats in [0, 1]; ConfigError for others. Of a pixel it is
  (max - min) / (1 - |max + min - 1|), and 0 where max = min; in fp32, or wider where
  the images are, and the mean over pixels in float64.
  """
  x_BHWC = np.asarray(images_BHWC)
  if x_BHWC.ndim != 4 or x_BHWC.shape[-1] not in (1, 3):
    raise ConfigError(
      f"saturation needs images of shape (B, H, W, 3 or 1), got {x_BHWC.shape}"
    )
  one = 255 if x_BHWC.dtype == np.uint8 else 1
  if one == 1 and not (
    x_BHWC.dtype.kind == "f" and x_BHWC.min() >= 0 and x_BHWC.max() <= 1
  ):
    raise ConfigError(
      f"saturation needs uint8 images or floats in [0, 1], got {x_BHWC.dtype} from "
      f"{x_BHWC.min():g} to {x_BHWC.max():g}"
    )
  # One at a time stays in the cache.
  return np.array([[_saturation_of(x_HWC, one)] for x_HWC in x_BHWC])


def _saturation_of(x_HWC: np.ndarray, one: int) -> float:
  # By channels, since a reduction over three neighbours is slow.
  channels = [np.ascontiguousarray(x_HWC[..., c]) for c in range(x_HWC.shape[-1])]
  most_HW, least_HW = (
    functools.reduce(f, channels).astype(np.result_type(x_HWC, np.float32))
    for f in (np.maximum, np.minimum)
  )
  room_HW = one - np.abs(most_HW + least_HW - one)
  # It is 0 only where both are black or both white, and never below their difference.
  s_HW = (most_HW - least_HW) / np.maximum(room_HW, np.finfo(room_HW.dtype).tiny)
  return float(s_HW.mean(dtype=np.float64))


def _kid(pair: Pair) -> Value:
  """Mean over subsets of the unbiased squared MMD, as torch-fidelity has it.

  Kernel (x.y / E + 1)^3. The subsets are those of torch-fidelity for the same seed; of
  fewer samples than one holds they are as large as they can be.
  """
  x_NE, y_ME = pair.sample_NE, pair.reference_ME
  size = min(SUBSET, len(x_NE), len(y_ME))
  rng = np.random.RandomState(pair.seed)
  times_RN = pair.times(len(x_NE))

  def look(drawn: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Sums over pairs of different samples, over samples, and over the reference."""
    i, j = drawn
    x, y, times_RI = x_NE[i], y_ME[j], times_RN[:, i]
    among_II, among_JJ = _kernel(x, x), _kernel(y, y)
    np.fill_diagonal(among_II, 0)
    among = ((times_RI @ among_II) * times_RI).sum(axis=1)
    pairs = times_RI.sum(axis=1) ** 2 - (times_RI**2).sum(axis=1)
    across = times_RI @ _kernel(x, y).mean(axis=1)
    own = (among_JJ.sum() - np.trace(among_JJ)) / (size * (size - 1))
    return np.stack(
      [among, pairs, across, times_RI.sum(axis=1), np.full(len(times_RI), own)]
    )

  def draw(x: np.ndarray) -> np.ndarray:
    return rng.choice(len(x), size, replace=False)

  subsets = [(draw(x_NE), draw(y_ME)) for _ in range(SUBSETS)]
  sums = np.sum(list(threads.each(look, subsets)), axis=0)
  among_R, pairs_R, across_R, drawn_R, own_R = sums
  with np.errstate(invalid="ignore"):  # a replicate of one sample alone
    return pair.value(among_R / pairs_R - 2 * across_R / drawn_R + own_R / SUBSETS)


def _kernel(x_UE: np.ndarray, y_VE: np.ndarray) -> np.ndarray:
  """(x.y / E + 1)^3 in float64."""
  k_UV = x_UE.astype(np.float64) @ y_VE.astype(np.float64).T
  k_UV /= x_UE.shape[1]
  k_UV += 1
  return k_UV * k_UV * k_UV  # a power of 3 takes logarithms


# --- the table ------------------------------------------------------------------------

Needs = Literal["none", "moments", "features"]


@dataclasses.dataclass(frozen=True)
class Metric:
  """output: of an extractor, that it is taken of. takes and needs: what it wants of the
  samples and of the reference. better: which way. compute: assumes that both are there,
  and of at least `least` images where features are wanted.
  """

  output: str
  takes: Needs
  needs: Needs
  better: Literal["lower", "higher", "neither"]
  compute: Callable[[Pair], Value]
  least: int = 2


def _manifold(of: Callable[[neighbours.Inside], np.ndarray]) -> Metric:
  compute, least = _share(of), neighbours.K + 1
  return Metric("pool", "features", "features", "higher", compute, least)


def _of_logits(epsilon: float) -> Metric:
  compute = functools.partial(_inception_score, epsilon=epsilon)
  return Metric("logits", "features", "none", "higher", compute)


METRICS: Mapping[str, Metric] = {
  "fid": Metric("pool", "moments", "moments", "lower", _frechet),
  "sfid": Metric("spatial", "moments", "moments", "lower", _frechet),
  "is": _of_logits(0.0),
  "precision": _manifold(lambda found: found.sample_N),
  "recall": _manifold(lambda found: found.reference_M),
  "fdd": Metric("cls", "moments", "moments", "lower", _frechet),
  "kid": Metric("pool", "features", "features", "lower", _kid),
  # Of the pixels themselves, see `saturation`.
  "saturation": Metric("saturation", "features", "none", "neither", _saturation),
  # As ELIT's evaluator has them, not comparable with the ADM ones: within the ball of
  # the nearest centre alone, and 1e-10 within the logarithms.
  "precision-nearest": _manifold(lambda found: found.sample_nearest_N),
  "recall-nearest": _manifold(lambda found: found.reference_nearest_M),
  "is-eps": _of_logits(1e-10),
}


def evaluate(
  names: Sequence[str],
  sample: Statistics,
  reference: Statistics | None = None,
  bootstrap: int = 25,
  seed: int = 0,
) -> dict[str, Value]:
  """The named METRICS of samples against a reference, with standard errors.

  Everything is checked before anything is computed: ConfigError for an unknown name,
  outputs that are missing on either side, of another width or extractor, not finite, or
  of too few images. A Frechet distance's error takes `bootstrap` replicates, a spectrum
  each, and is itself uncertain by about 1 / sqrt(2 bootstrap); 0 leaves all errors out.
  Metrics of one output follow each other, so that its sums are held alone: at most
  `GROUPS` float64 covariances besides the features.
  """
  metrics = {name: lookup(METRICS, name, "metric") for name in names}
  if bootstrap < 0 or bootstrap == 1:
    raise ConfigError(f"bootstrap={bootstrap}: want 0, for no errors, or at least 2")
  check(names, sample, reference)
  found: dict[str, Value] = {}
  for output in dict.fromkeys(metric.output for metric in metrics.values()):
    pair = Pair(sample, reference, output, bootstrap, seed)
    for name, metric in metrics.items():
      if metric.output == output:
        found[name] = metric.compute(pair)
  return {name: found[name] for name in names}


def check(
  names: Sequence[str], sample: Statistics, reference: Statistics | None
) -> None:
  """ConfigError for whatever keeps a metric from being computed."""
  for name in names:
    _check(name, lookup(METRICS, name, "metric"), sample, reference)


def _check(
  name: str, metric: Metric, sample: Statistics, reference: Statistics | None
) -> None:
  output = metric.output
  width = _width(name, metric, metric.takes, sample)
  if metric.needs == "none":
    return
  if reference is None:
    raise ConfigError(f"{name} needs a reference: give statistics to compare with")
  check_same_extractor(sample, reference, output)
  other = _width(name, metric, metric.needs, reference)
  if width != other:
    raise ConfigError(
      f"{sample.title} has {width} features {output!r} and {reference.title} {other}: "
      "extract both in the same way"
    )


def _width(name: str, metric: Metric, wanted: Needs, statistics: Statistics) -> int:
  """Features of the output, if it is there in the form wanted; else ConfigError."""
  output = metric.output
  is_known = output in statistics.moments or output not in statistics.features
  if wanted == "moments" and is_known:
    return statistics.gaussian(output, name).mu_E.size
  count, width = statistics.feature(output, name).shape
  if count < metric.least:
    raise ConfigError(
      f"{statistics.title} has features {output!r} of {count} images: {name} needs at "
      f"least {metric.least}"
    )
  return width
