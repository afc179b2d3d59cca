"""Compares ways to choose exit thresholds, averages and confidence measures, on images that chose nothing.

    python benchmarks/exit_policies.py record STUDENT DATA SPLIT LOGITS.npz   # logits of val and test, and stage times
    python benchmarks/exit_policies.py frozen DATA WEIGHTS LOGITS.npz         # linear heads on a frozen ResNet18
    python benchmarks/exit_policies.py compare LOGITS.npz … --out benchmarks/results/exit-policies.md

`compare` draws path images again and again; everything is chosen on them, and judged on the other images. It prints

1. thresholds: the expected latency at equal shares of changed answers (against the last exit), and under a certificate;
2. averages and confidence measures: the same, with the accuracy on the way;
3. `edgekd tune --max-accuracy-drop`: the drop that was asked for, and the one on new images.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression
from scipy.stats import binom

from edgekd.bench.tables import pipe_table
from edgekd.errors import ConfigError
from edgekd.files import atomic_write
from edgekd.policy import NEVER_EXIT, Average, Policy, ensemble
from edgekd.runtime import thresholds as logistic
from edgekd.runtime.thresholds import at_every_exit, exits_taken, fit_pooling, fit_temperature
from edgekd.runtime.tuning import PATH_POINTS, choose
from edgekd.types import Array, Labels

Floats = npt.NDArray[np.float64]
Method = Callable[[Array, Floats, Floats], Array]
"""Confidences (E, N), losses (E, N) and stage times (E,) of the path images to thresholds (S, E - 1), slow to fast."""
SIZES = (200, 800, 2400)
BOUNDS = np.geomspace(0.001, 0.1, 15)
CHANGED = (0.005, 0.01, 0.02)
CERTIFIED = (0.01, 0.02)
HEAD = """Made by `benchmarks/exit_policies.py compare`, {count} draws of path images. Latencies are in percent of the
latency without early exit, from the stages' times. *n % changed*: the mean latency at which n % of the answers to new
images differ from the last exit's (own, geometric) or from the mean's; – where every setting changes more. *certified*:
the mean latency under a fixed-sequence test on as many further images (certainty 0.9, exact binomial); 100 means that
nothing could be certified."""
QUICK = """`edgekd tune --max-accuracy-drop`; the reference is the last exit or the ensemble, whichever has more of the
images right. *Above what was asked*: the share of draws in which new images lose more. Where edgekd refuses because
no setting keeps the bound, the draw counts as the last exit (with the average mean: the mean) without early exit."""
MEASURES = ("max_probability", "margin", "entropy")


@dataclass(frozen=True)
class Recorded:
    """Logits (E, N, C), class indices (N,) and stage times (E,) of one network."""

    name: str
    logits: Array
    labels: Labels
    stages: Floats


def mean_of(table: npt.NDArray[Any], taken: npt.NDArray[np.int8]) -> Floats:
    return np.asarray(table[taken, np.arange(table.shape[1])].mean(axis=1))


def latencies(taken: npt.NDArray[np.int8], stages: Floats) -> Floats:
    return np.asarray(np.cumsum(stages)[taken].mean(axis=1))


def front(confidences: Array, losses: Floats, stages: Floats, thresholds: Array) -> Array:
    """Keep the settings that no other one beats in loss and latency."""
    taken = exits_taken(confidences, thresholds)
    loss, ms = mean_of(losses, taken), latencies(taken, stages)
    kept, best = [], np.inf
    for i in np.lexsort([ms, loss]).tolist():
        if ms[i] < best - 1e-12:
            best = ms[i]
            kept.append(i)
    return thresholds[kept]


def grid(confidences: Array, losses: Floats, stages: Floats, *, combinations: int = 2000) -> Array:
    """Every combination of some quantiles, as `edgekd tune` had it until version 0.12."""
    exits = len(confidences)
    each = max(2, int(min(50, combinations ** (1 / max(exits - 1, 1)) + 1e-9)))
    quantiles = np.linspace(0, 1, each)[1:-1] ** 2
    columns = [[0.0, *np.quantile(c, quantiles), NEVER_EXIT][:each] for c in confidences[:-1]]
    return front(confidences, losses, stages, np.array(list(itertools.product(*columns)), np.float32))


def isotonic(confidences: Array, losses: Floats, stages: Floats, *, timed: bool = True) -> Array:
    """One δ over isotonic fits of the loss (PCEE); with `timed`, δ is multiplied by the time saved."""
    ends = np.cumsum(stages)
    saved = (ends[-1] - ends[:-1]) / (ends[-1] - ends[0]) if timed else np.ones(len(ends) - 1)
    fits = []
    for confidence, loss in zip(confidences[:-1], losses):
        order = np.argsort(confidence, kind="stable")
        fits.append((confidence[order], isotonic_regression(loss[order], increasing=False).x))
    levels = np.unique(np.concatenate([fit / share for (_, fit), share in zip(fits, saved)]))
    rows = []
    for level in np.quantile(levels, np.linspace(0, 1, 200)):
        row = []
        for (confidence, fit), share in zip(fits, saved):
            i = int(np.searchsorted(-fit, -level * share - 1e-12))
            row.append(NEVER_EXIT if i == len(fit) else 0.0 if i == 0 else (confidence[i - 1] + confidence[i]) / 2)
        rows.append(row)
    return np.unique(np.array(rows, np.float32), axis=0)[::-1]


def descent(confidences: Array, losses: Floats, stages: Floats, *, candidates: int = 16) -> Array:
    """Joint thresholds: for each price of a loss, each exit's best quantile given the others', until none changes."""
    exits = len(confidences)
    ends = np.cumsum(stages)
    options = [
        np.array([NEVER_EXIT, *np.quantile(c, np.linspace(0, 1, candidates)[1:-1] ** 2)[::-1], 0.0], np.float32)
        for c in confidences[:-1]
    ]
    chosen, rows = np.full(exits - 1, NEVER_EXIT, np.float32), []
    for price in np.geomspace(1e4, 0.3, PATH_POINTS) * ends[-1]:
        costs = ends[:, None] + price * losses
        for _ in range(4):
            before = chosen.copy()
            for exit in reversed(range(exits - 1)):
                tried = np.repeat(chosen[None], len(options[exit]), axis=0)
                tried[:, exit] = options[exit]
                chosen = tried[int(mean_of(costs, exits_taken(confidences, tried)).argmin())]
            if (chosen == before).all():
                break
        rows.append(chosen)
    return front(confidences, losses, stages, np.unique(np.array(rows), axis=0))


def pcee(confidences: Array, losses: Floats, stages: Floats) -> Array:
    """Isotonic fits and one δ, however much time an exit saves."""
    return isotonic(confidences, losses, stages, timed=False)


def timed(confidences: Array, losses: Floats, stages: Floats) -> Array:
    """What edgekd does."""
    return logistic.candidate_thresholds(confidences, losses, stages.tolist())


def untimed(confidences: Array, losses: Floats, stages: Floats) -> Array:
    """The logistic model with the same δ for every exit, however much time it saves."""
    equal = np.append(1e-9 * np.arange(1, len(stages)), 1.0)  # all exits but the last save the same
    return logistic.candidate_thresholds(confidences, losses, equal.tolist())


METHODS: dict[str, Method] = {
    "grid (earlier edgekd)": grid,
    "coordinate descent": descent,
    "isotonic (PCEE)": pcee,
    "isotonic, timed": isotonic,
    "logistic": untimed,
    "logistic, timed (edgekd)": timed,
}


def thinned(ms: Floats) -> npt.NDArray[np.int64]:
    """Return the indices of at most `PATH_POINTS` settings, evenly in latency."""
    even = np.linspace(ms[0], ms[-1], PATH_POINTS)
    return np.unique(np.abs(ms - even[:, None]).argmin(axis=1))


@dataclass
class Draws:
    """Sums over draws for one way to choose: held-out loss, latency and accuracy by bound; certified latency."""

    by_bound: Floats
    certified: Floats
    seconds: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls) -> Draws:
        return cls(np.zeros((len(BOUNDS), 3)), np.zeros(len(CERTIFIED)))

    def row(self, full: float) -> list[str]:
        """Latency in percent of the full one, at equal shares of changed answers and under certificates."""
        loss, ms, _ = (self.by_bound / self.count).T
        order = np.argsort(loss)
        equal = np.interp(CHANGED, loss[order], ms[order])
        reached = loss.min() <= np.array(CHANGED)
        cells = [f"{100 * x / full:.1f}" if ok else "–" for x, ok in zip(equal, reached)]
        return cells + [f"{100 * x / self.count / full:.1f}" for x in self.certified]


def judge(draws: Draws, data: Recorded, policy: Policy, method: Method, path: Labels, rest: Labels) -> None:
    """Choose on the path images, by each bound and by a certificate, and add what the rest shows."""
    (confidences,), answers = at_every_exit(data.logits, policy, (policy.confidence,))
    losses, wrong = (answers != answers[-1]).astype(np.float64), answers != data.labels
    start = time.perf_counter()
    settings = method(confidences[:, path], losses[:, path], data.stages)
    draws.seconds += time.perf_counter() - start
    never = np.full((1, len(confidences) - 1), NEVER_EXIT, np.float32)
    settings = np.concatenate([never, settings])
    taken = exits_taken(confidences[:, path], settings)
    loss, ms = mean_of(losses[:, path], taken), latencies(taken, data.stages)
    half = rest[: min(len(path), len(rest) // 2)]
    new = rest[len(half) :]
    seen = exits_taken(confidences[:, new], settings)
    new_loss, new_ms, error = mean_of(losses[:, new], seen), latencies(seen, data.stages), mean_of(wrong[:, new], seen)
    for i, bound in enumerate(BOUNDS):
        keeps = loss + np.sqrt(loss / len(path)) <= bound
        best = int(np.where(keeps, ms, np.inf).argmin())
        draws.by_bound[i] += new_loss[best], new_ms[best], 1 - error[best]
    steps = thinned(ms)
    lost = np.rint(mean_of(losses[:, half], exits_taken(confidences[:, half], settings[steps])) * len(half))
    for i, bound in enumerate(CERTIFIED):
        fails = np.append(binom.cdf(lost, len(half), bound) > 0.1, True)
        fails[0] = False  # never: no loss
        draws.certified[i] += new_ms[steps[int(fails.argmax()) - 1]]
    draws.count += 1


def thresholds_table(sets: list[Recorded], count: int) -> str:
    header = ["network", "path images", "thresholds by", *(f"{100 * c:g} % changed" for c in CHANGED)]
    rows = [[*header, *(f"certified {100 * c:g} %" for c in CERTIFIED), "ms to choose"]]
    for data, size in itertools.product(sets, SIZES):
        if size > 0.6 * len(data.labels):
            continue
        found = {name: Draws.empty() for name in METHODS}
        for path, rest in draws_of(data, size, count):
            temperatures = tuple(fit_temperature(z, data.labels[path]) for z in data.logits[:, path])
            for name, method in METHODS.items():
                judge(found[name], data, Policy(temperatures), method, path, rest)
        for name, draws in found.items():
            row = [*draws.row(float(data.stages.sum())), f"{1000 * draws.seconds / draws.count:.0f}"]
            rows.append([data.name, str(size), name, *row])
    return pipe_table((rows[0], rows[1:]))


def averages_table(sets: list[Recorded], count: int) -> str:
    header = ["network", "path images", "average, confidence", *(f"{100 * c:g} % changed" for c in CHANGED)]
    rows = [[*header, *(f"certified {100 * c:g} %" for c in CERTIFIED), "accuracy % without early exit"]]
    for data, size in itertools.product(sets, SIZES):
        if size > 0.6 * len(data.labels):
            continue
        ways = list(itertools.product(get_args(Average), MEASURES))
        found = {way: Draws.empty() for way in ways}
        for path, rest in draws_of(data, size, count):
            logits, labels = data.logits[:, path], data.labels[path]
            temperatures = tuple(fit_temperature(z, labels) for z in logits)
            pooling = fit_pooling(logits, labels, temperatures)
            for average, measure in ways:
                weights = pooling if average == "geometric" else ()
                policy = Policy(temperatures, confidence=measure, average=cast(Average, average), pooling=weights)
                judge(found[average, measure], data, policy, timed, path, rest)
        mean = ensemble(data.logits).argmax(axis=1) if len(data.logits) > 1 else data.logits[0].argmax(axis=1)
        exact = {"mean": (mean == data.labels).mean()}
        for (average, measure), draws in found.items():
            accuracy = exact.get(average, (data.logits[-1].argmax(axis=1) == data.labels).mean())
            cells = [*draws.row(float(data.stages.sum())), f"{100 * accuracy:.2f}"]
            rows.append([data.name, str(size), f"{average}, {measure}", *cells])
    return pipe_table((rows[0], rows[1:]))


def earlier_choice(logits: Array, labels: Labels, stages: Floats, drop: float) -> tuple[Policy, Array]:
    """`edgekd tune` until version 0.12: the mean, the largest probability, a grid, the ensemble as the reference."""
    policy = Policy(tuple(fit_temperature(z, labels) for z in logits), average="mean")
    (confidences,), answers = at_every_exit(logits, policy, (policy.confidence,))
    right, reference = answers == labels, ensemble(logits).argmax(axis=1) == labels
    exits = len(logits)
    each = max(2, int(min(50, 2000 ** (1 / max(exits - 1, 1)) + 1e-9)))
    quantiles = np.linspace(0, 1, each)[1:-1] ** 2
    columns = [[0.0, *np.quantile(c, quantiles), NEVER_EXIT][:each] for c in confidences[:-1]]
    settings = np.array(list(itertools.product(*columns)), np.float32)
    taken = exits_taken(confidences, settings)
    safest = mean_of(right, taken) - np.sqrt(mean_of(right != reference, taken) / len(labels))
    keeps = safest >= min(reference.mean() - drop / 100, safest.max()) - 1e-9
    return policy, settings[int(np.where(keeps, latencies(taken, stages), np.inf).argmin())]


def quick_table(sets: list[Recorded], count: int) -> str:
    header = ["network", "images", "asked, points", "chosen by", "drop on new images", "above what was asked, %"]
    rows = [[*header, "accuracy %", "latency, % of no early exit"]]
    for data, size, drop in itertools.product(sets, (300, 800), (0.3, 1.0)):
        if size > 0.6 * len(data.labels):
            continue
        means, last = ensemble(data.logits).argmax(axis=1) == data.labels, data.logits[-1].argmax(axis=1) == data.labels
        found: dict[str, list[tuple[float, float, float]]] = {}
        for path, rest in draws_of(data, size, count):
            logits, labels = data.logits[:, path], data.labels[path]
            reference = max(means[rest].mean(), last[rest].mean())
            policies = {"grid, mean (earlier edgekd)": earlier_choice(logits, labels, data.stages, drop)}
            for average in ("own", "mean", "auto"):
                stages = tuple(data.stages.tolist())
                reference_right = max(means[path], last[path], key=np.count_nonzero)
                try:
                    tuned = choose(
                        logits, labels, stages, average=average, reference=reference_right, max_accuracy_drop=drop
                    )
                    policy = tuned.policy
                except ConfigError:  # no setting of this average keeps the bound
                    policy = Policy(
                        (1.0,) * len(logits), average="mean" if average == "mean" else "own"
                    ).without_early_exit()
                policies[f"edgekd, average {average}"] = policy, np.float32(policy.thresholds)
            for name, (policy, setting) in policies.items():
                (confidences,), answers = at_every_exit(data.logits[:, rest], policy, (policy.confidence,))
                taken = exits_taken(confidences, setting[None])
                right = mean_of(answers == data.labels[rest], taken)[0]
                ms = latencies(taken, data.stages)[0] / data.stages.sum()
                found.setdefault(name, []).append((100 * (reference - right), 100 * right, 100 * ms))
        for name, results in found.items():
            lost, right, ms = np.array(results).T
            cells = [
                f"{lost.mean():.2f}",
                f"{100 * (lost > drop).mean():.0f}",
                f"{right.mean():.2f}",
                f"{ms.mean():.1f}",
            ]
            rows.append([data.name, str(size), f"{drop:g}", name, *cells])
    return pipe_table((rows[0], rows[1:]))


def draws_of(data: Recorded, size: int, count: int) -> list[tuple[Labels, Labels]]:
    """Divide the images into path images and the rest, `count` times."""
    orders = [np.random.default_rng(seed).permutation(len(data.labels)) for seed in range(count)]
    return [(order[:size], order[size:]) for order in orders]


def record(student: Path, data: Path, split: Path, out: Path) -> None:
    """Write the logits of a network for the validation and test images, and the times of its stages."""
    from edgekd.data.images import load_subset
    from edgekd.data.split import read_split
    from edgekd.runtime.engine import open_engine
    from edgekd.runtime.tuning import stage_ms

    engine = open_engine(student, threads=1)
    parts = [
        load_subset(read_split(split), s, data=data, preprocess=engine.metadata.preprocess) for s in ("val", "test")
    ]
    images, labels = (np.concatenate(column) for column in zip(*parts))
    logits = [engine.logits(images[i : i + 32]) for i in range(0, len(images), 32)]
    np.savez(out, logits=np.concatenate(logits, axis=1), labels=labels, stages=stage_ms(engine, images[:1]))


def frozen(data: Path, weights: Path, out: Path, *, size: int = 64, each: int = 60) -> None:
    """Write the logits of linear exits on the blocks of a frozen ImageNet ResNet18, for images of DATA/test.

    The last exit learns from the labels of `each` images a class of DATA/train, the others from its answers. The blocks
    do about equally many multiplications, and their share stands for their time.
    """
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from torchvision.models import resnet18

    network = resnet18()
    network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(weights).items()})
    network.eval()
    stem = torch.nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    blocks = [block for layer in (network.layer1, network.layer2, network.layer3, network.layer4) for block in layer]
    normal = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]

    def features(paths: list[Path]) -> list[Array]:
        found: list[list[Array]] = [[] for _ in blocks]
        for start in range(0, len(paths), 64):
            pixels = [
                np.asarray(Image.open(p).convert("RGB").resize((size, size), 2)) for p in paths[start : start + 64]
            ]
            with torch.inference_mode():
                x = stem((torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - normal[0]) / normal[1])
                for block, rows in zip(blocks, found):
                    x = block(x)
                    rows.append(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1).numpy())
        return [np.concatenate(rows) for rows in found]

    classes = sorted(folder.name for folder in (data / "test").iterdir())
    paths = {s: [p for c in classes for p in sorted((data / s / c).iterdir())[:each]] for s in ("train", "test")}
    learned, judged = features(paths["train"]), features(paths["test"])
    labels = np.repeat(np.arange(len(classes)), each)
    targets, logits = labels, []
    for train, test in zip(reversed(learned), reversed(judged)):
        scale = StandardScaler().fit(train)
        head = LogisticRegression(C=1e-3, max_iter=200).fit(scale.transform(train), targets)
        if not logits:
            targets = head.predict(scale.transform(train))
        logits.append(head.decision_function(scale.transform(test)))
    stages = np.array([1.3, *[1.0] * 7])
    np.savez(out, logits=np.float32(logits[::-1]), labels=labels, stages=stages)


def read(path: Path) -> Recorded:
    arrays = np.load(path)
    return Recorded(path.stem, arrays["logits"], arrays["labels"], arrays["stages"].astype(np.float64))


def compare(paths: list[Path], out: Path, count: int) -> None:
    sets = [read(path) for path in paths]
    networks = [
        ["network", "exits", "classes", "images", "accuracy % of each exit", "share of the time of each stage, %"]
    ]
    for data in sets:
        accuracy = " / ".join(f"{100 * (z.argmax(axis=1) == data.labels).mean():.1f}" for z in data.logits)
        shares = " / ".join(f"{100 * s:.0f}" for s in data.stages / data.stages.sum())
        exits, images, classes = data.logits.shape
        networks.append([data.name, str(exits), str(classes), str(images), accuracy, shares])
    parts = [
        "# Exit policies on held-out images",
        HEAD.format(count=count),
        pipe_table((networks[0], networks[1:])),
        "## Thresholds",
        "Every exit predicts by itself, by the largest probability.",
        thresholds_table(sets, count),
        "## Averages and confidence measures",
        "Thresholds by the logistic model.",
        averages_table(sets, count),
        "## The quick way",
        QUICK,
        quick_table(sets, count),
    ]
    atomic_write(out, ("\n\n".join(parts) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (("record", ("student", "data", "split", "out")), ("frozen", ("data", "weights", "out"))):
        command = commands.add_parser(name)
        for word in words:
            command.add_argument(word, type=Path)
    command = commands.add_parser("compare")
    command.add_argument("logits", type=Path, nargs="+")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--draws", type=int, default=100)
    given = vars(parser.parse_args())
    name = given.pop("command")
    if name == "compare":
        compare(given["logits"], given["out"], given["draws"])
    else:
        {"record": record, "frozen": frozen}[name](**given)


if __name__ == "__main__":
    main()
