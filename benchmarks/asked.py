"""What was asked of the benchmarks: the papers' figures and tables, their values, and where ours stand.

One entry for each figure or table that is reproduced, and for each figure that was asked for beside them. Our numbers
are not written here but picked from the results (:func:`benchmarks.results_tables.pick`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.results_tables import pick

__all__ = ["ASKED", "PAPERS", "Asked"]

PAPERS = {
    "whitening": "Lafond, Vasilache, Bottou: Diagonal Rescaling For Neural Networks",
    "fim": "Cowlagi, Chaudhari: Does the Geometry of the Data Control the Geometry of Neural Predictions?",
    "geodesic": "Geodesic sparsification",
    "thesis": "Gradient Conditioning in Deep Neural Networks (thesis)",
    "gradnet": "GradNet",
}
_Names = Mapping[str, object]


@dataclass(frozen=True)
class Asked:
    """A figure that was asked for.

    Attributes:
        paper: a key of ``PAPERS``.
        where: figure or table in the paper; empty for one that the paper does not have.
        what: what is measured.
        question: the benchmark that answers.
        column: that holds the numbers.
        key: column that tells ours from the others.
        ours: name to show -> value of ``key``.
        peers: likewise, of the same run.
        of: further columns and values of the rows.
        value: the paper's; empty where it gives none.
        wanted: of us.
        count: whether the rows are counted rather than their median taken.
        weights: where it is given, only rows whose P is within a factor of two of it.
    """

    paper: str
    where: str
    what: str
    question: str
    column: str
    key: str
    ours: _Names
    peers: _Names = field(default_factory=dict)
    of: _Names = field(default_factory=dict)
    value: str = ""
    wanted: str = ""
    count: bool = False
    weights: int = 0

    def numbers(self, record: Mapping[str, Any] | None, value: object) -> list[float]:
        """The numbers that a record has for a value of ``key``.

        Args:
            record: a result, or None.
            value: of ``ours`` or ``peers``.

        Returns:
            One for each row, usually a seed; empty where there is none.
        """
        where = {**self.of, self.key: value}
        found = pick(record, where, self.column)
        if not self.weights:
            return found
        sizes = pick(record, where, "P")
        return [x for x, size in zip(found, sizes, strict=True) if self.weights / 2 < size < 2 * self.weights]


def _whitening() -> list[Asked]:
    first = Asked(
        "whitening",
        "Fig. 2",
        "training loss of `lenet`, 8 epochs of 10,000 images",
        "does_whitening_lower_the_training_loss",
        "training loss",
        "method",
        {"": "whitening"},
        {"batch norm": "batch norm", "1/sqrt(n s)": "SGD with*", "SGD": "SGD", "Adam": "Adam"},
        value="whitening below batch norm below SGD (a plot)",
        wanted="the same order; below half of SGD's",
    )
    untuned = Asked(
        "whitening",
        "",
        "final training loss without a learning rate",
        "does_whitening_need_a_learning_rate",
        "loss",
        "method",
        {"": "WhiteningSGD(model)"},
        {"SGD": "SGD", "momentum": "SGD, mom*0.9", "Adam": "Adam", "AdamW": "AdamW", "paper's rule": "the paper's*ing"},
        wanted="level with each tuned baseline",
    )
    rescaled = replace(
        untuned,
        where="§4.4",
        what="the same after units were rescaled half way",
        ours={"": "WhiteningSGD(model), units*"},
        peers={"momentum": "SGD, mom*units*", "Adam": "Adam, units*", "paper's rule": "the paper's*units*"},
        wanted="1.1 times the undisturbed",
    )
    step = Asked(
        "whitening",
        "",
        "a step in units of SGD's",
        "what_does_a_whitening_step_cost",
        "ratio to SGD",
        "candidate",
        {"": "WhiteningSGD", "paper's rule": "WhiteningSGD, rule whitening"},
        {"batch norm": "batch norm, SGD", "Adam": "Adam"},
        wanted="1.20; paper's rule 1.10",
    )
    natural = replace(
        step,
        where="§3",
        what="a natural gradient's step in units of SGD's",
        question="what_does_a_natural_gradient_step_cost",
        ours={
            "K-FAC": "kfac",
            "one-sided": "kronecker, units*",
            "diagonal": "diagonal, layers",
            "unit": "whitening, units",
        },
        peers={"SINGD": "SINGD, dense*", "SOAP": "SOAP (pyt*", "Adam": "Adam"},
    )
    loss = replace(
        untuned,
        where="§3",
        what="training loss after 100 steps",
        question="does_the_natural_gradient_lower_the_loss",
        ours={"K-FAC": "kfac", "TRPO's": "trpo", "Kronecker": "kronecker, units", "whitening": "whitening, units"},
        peers={"momentum": "SGD, momentum*", "Adam": "Adam", "SOAP": "SOAP"},
        wanted="every member beside tuned peers",
    )
    networks = ("lenet", "mlp_deep", "char_gpt", "resnet20")
    rest = {"vgg_small, batch 64": "paper's rule 1.06", "resnet18 without norms, batch 64": "1.12; paper's rule 1.06"}
    steps = {"lenet, batch 64": step.wanted, "lenet, batch 128": step.wanted, **rest}
    naturals = {
        "lenet, batch 64": "K-FAC 1.6; diagonal and unit 1.25",
        "mlp_wide, batch 128": "K-FAC 5, one-sided 3; diagonal and unit 1.25",
    }
    return [
        first,
        *(_on(untuned, network=name) for name in networks),
        *(_on(rescaled, network=name) for name in networks),
        *(_on(step, wanted, job=job) for job, wanted in steps.items()),
        *(_on(natural, wanted, job=job) for job, wanted in naturals.items()),
        *(_on(loss, network=name) for name in ("mlp2", "lenet", "char_gpt")),
    ]


def _fim() -> list[Asked]:
    claims = Asked(
        "fim",
        "Fig. 2",
        "claims",
        "how_sloppy_are_networks_and_their_data",
        "number",
        "verdict",
        {"confirmed": "confirmed", "contradicted": "contradicted"},
        value="all hold",
        wanted="each confirmed or contradicted by a number",
        count=True,
    )
    lost = Asked("fim", "Fig. 3", "", "how_much_of_a_network_is_stiff", "", "rule", {"": "ours*"})
    cases = [
        ("one_shot", "5%", "0.5", {"the paper's rule": "paper: exact, eigenvalue", "pruning": "magnitude pruning"}),
        ("gradual", "5%", "0.2", {"pruning": "gradual magnitude pruning"}),
        ("gradual", "1%", "1.5", {"pruning": "gradual magnitude pruning"}),
    ]
    stiff = [
        replace(
            lost,
            what=f"points of accuracy lost at {share} of `{network}`'s directions, {kind.replace('_', ' ')}",
            column=f"points lost at {share}",
            peers=peers,
            of={"network": network, "kind": kind},
            value="2 (77 % to 75 %)" if (network, share) == ("allcnn9", "5%") else "",
            wanted=f"at most {most}",
        )
        for network in ("allcnn9", "lenet", "mlp_thin")
        for kind, share, most, peers in cases
    ]
    whole = Asked(
        "fim",
        "",
        "whole spectrum, in units of curvlinops with eigsh for the ten largest, processor time",
        "how_fast_is_a_whole_spectrum",
        "cpu ratio to top 10, curvlinops + eigsh",
        "candidate",
        {"": "whole spectrum, float64", "float32": "whole spectrum, float32*"},
        wanted="0.5",
    )
    whole_at_1e5 = replace(whole, what=f"{whole.what}, eigsh at 1e-5", column="cpu ratio")
    agreement = replace(
        whole,
        what="ten largest eigenvalues off from those in float64, relative",
        column="top ten off by",
        ours={"float32": "whole spectrum, float32*"},
        peers={"eigsh": "top 10, curvlinops + eigsh", "eigsh at 1e-5": "top 10, curvlinops + eigsh, tol*"},
        wanted="1e-5",
    )
    large = Asked(
        "fim",
        "",
        "GiB for the fifty largest eigenvalues",
        "how_large_a_network_can_a_spectrum_see",
        "peak_GiB",
        "way",
        {"iterated": "iterated", "formed": "formed"},
        wanted="24",
    )
    return [
        claims,
        *stiff,
        *(_on(asked, network=network) for asked in (whole, whole_at_1e5, agreement) for network in ("mlp2", "cnn3")),
        *(_on(large, network=network) for network in ("resnet18", "transformer")),
    ]


def _geodesic() -> list[Asked]:
    kept = Asked(
        "geodesic",
        "Fig. 1",
        "accuracy of `mlp2` on MNIST, no labels, share of weights cut",
        "does_a_geodesic_keep_the_function",
        "accuracy",
        "method",
        {"": "compensated path"},
        {
            "one shot": "one-shot magnitude",
            "gradual, equal seconds": "gradual magnitude, equal*",
            "Eq. (5)": "Eq. (5)*",
        },
    )
    labels = replace(
        kept,
        what="the same with labels for one epoch",
        ours={"": "compensated path and one epoch"},
        peers={"gradual, three epochs": "gradual magnitude, three epochs"},
    )
    filters = Asked(
        "geodesic",
        "Figs. 2A, 2B",
        "accuracy of `vgg11` without 78% of its first filters",
        "can_filters_be_removed_along_a_geodesic",
        "last",
        "method",
        {"no labels": "compensated path", "10 epochs": "compensated path, training, 3*"},
        {
            "dense": "dense",
            "magnitude": "magnitude",
            "magnitude, 10 epochs": "magnitude, the same*",
            "31 epochs": "magnitude and fine-tuning, 3*",
        },
        {"part": "A"},
        value="above prune and fine-tune (a plot)",
        wanted="at most 10 epochs, beside 70",
    )
    stations = replace(
        filters,
        where="Fig. 2D",
        what="dense, filters out, units out, filters back",
        ours={"no labels": "compensated path, no labels", "4 epochs": "compensated path, 4 epochs"},
        peers={"cut and put back": "cut and put back*"},
        of={"part": "D"},
        value="at most 5 epochs",
        wanted="at most 5 epochs",
    )
    tasks = replace(
        filters,
        where="Fig. 2F",
        what="lower accuracy of one network on MNIST and on Fashion-MNIST",
        ours={"": "compensated path, best*"},
        peers={"straight line": "straight line, best*"},
        of={"part": "F"},
        value=".80",
        wanted=".80",
    )
    step = Asked(
        "geodesic",
        "Eq. (5)",
        "",
        "what_does_a_geodesic_step_cost",
        "seconds",
        "method",
        {"": "ours"},
        {"Clarabel": "Clarabel"},
        wanted="beside Clarabel at 2,000, alone above",
    )
    return [
        _on(replace(kept, value=".968"), ".983", share=0.7),
        _on(kept, ".981", share=0.9),
        _on(kept, ".975", share=0.95),
        _on(labels, "level with gradual pruning of three epochs", share=0.95),
        filters,
        stations,
        tasks,
        *(
            replace(step, weights=size, what=f"seconds of a step, about {size:,} weights")
            for size in (2_000, 10**5, 10**7, 10**8)
        ),
    ]


def _thesis() -> list[Asked]:
    cost = Asked(
        "thesis",
        "Fig. 4.10",
        "a step with all Gram metrics, in steps",
        "what_do_diagnostics_cost",
        "ratio to *",
        "candidate",
        {"": "step, metrics of the Gram matrix", "per layer": "step, default metrics per layer"},
        {"BackPACK": "BackPACK*", "Cockpit": "Cockpit*"},
        value="many steps",
    )
    correlations = Asked(
        "thesis",
        "Figs. 2.5-4.9",
        "correlations of metrics with speed and final loss",
        "which_networks_are_well_conditioned",
        "rho, all",
        "holds, all",
        {"hold": True, "do not": False},
        value="all hold",
        wanted="each in a number",
        count=True,
    )
    controller = Asked(
        "thesis",
        "§4.2.2",
        "training loss with a controlled learning rate",
        "does_the_controller_beat_a_constant_rate",
        "training loss",
        "rate",
        {"": "controller*"},
        {"best constant": "constant*best*", "best cosine": "cosine*best*"},
        value="an open question",
        wanted="below the best constant on one task",
    )
    gram = replace(
        cost,
        where="",
        what="Gram matrix of all gradients, in forward and backward passes",
        question="what_does_the_gram_matrix_cost",
        ours={"": "per_sample_gram"},
        peers={"vmap": "torch.func*", "Opacus": "Opacus*", "BackPACK": "BackPACK*", "nngeometry": "nngeometry*"},
        value="",
    )
    jobs = ("mlp2, batch 128", "cnn3, batch 64", "resnet18, batch 32")
    return [
        *(_on(cost, most, job=job) for job, most in zip(jobs, ("1.5", "1.6", "1.9"), strict=True)),
        correlations,
        *(_on(controller, task=f"{task}*") for task in ("MLP", "lenet")),
        *(_on(gram, most, job=job) for job, most in zip(jobs, ("1.4", "1.3", "1.8"), strict=True)),
    ]


def _gradnet() -> list[Asked]:
    machine = Asked(
        "gradnet",
        "Table 1",
        "accuracy on the gradients of an RBM, MNIST",
        "do_rbm_gradients_classify_better",
        "accuracy",
        "features",
        {"": "gradients"},
        {"hidden units": "hidden units"},
        wanted="the paper's",
    )
    improved = Asked(
        "gradnet",
        "Table 2",
        "accuracy around a frozen `cnn_small`",
        "does_a_gradnet_improve_a_frozen_network",
        "accuracy",
        "method",
        {"": "gated", "linearised": "linearised"},
        {"paper's method": "paper", "MLP head": "MLP head", "continued, equal epochs": "continued, equal epochs"},
    )
    conclusions = Asked(
        "gradnet",
        "Figs. 4-9",
        "conclusions",
        "which_gradnet_settings_matter",
        "noise",
        "verdict",
        {name: name for name in ("holds", "fails", "no difference", "seeds disagree")},
        value="all hold",
        wanted="each in a number",
        count=True,
    )
    cost = Asked(
        "gradnet",
        "",
        "cost in units of the base's",
        "what_does_a_gradnet_cost",
        "ratio to *",
        "candidate",
        {"gated": "gated", "linearised": "linearised", "linearised, cached": "linearised, cached"},
    )
    features = replace(
        cost,
        ours={"": "gradients, percentile, norm"},
        peers={"vmap": "gradients by vmap", "Opacus": "gradients by Opacus"},
    )
    table_1 = {(16, "initial"): ".9675", (16, "trained"): ".9734", (64, "initial"): ".9822", (64, "trained"): ".9876"}
    table_2 = {
        "MNIST .92": (".98", ".984"),
        "MNIST .96": (".9857", ".9857"),
        "MNIST .9894": (".9914", ".9914"),
        "CIFAR-10 (JPEG) .49": (".678", ".67"),
        "CIFAR-10 (JPEG) .62": (".7274", ".7274"),
        "CIFAR-10 (JPEG) .72": (".7936", ".7936"),
        "CIFAR-10 (JPEG) .79": (".8289", ".8289"),
    }
    return [
        *(_on(replace(machine, value=v), machine=trained, hidden=units) for (units, trained), v in table_1.items()),
        *(_on(replace(improved, value=value), wanted, case=case) for case, (value, wanted) in table_2.items()),
        conclusions,
        _on(cost, "gated 1.5, linearised 1.8, cached 1.4", job="MNIST form: training step"),
        _on(cost, "gated 2.4, linearised 3.2", job="MNIST form: prediction"),
        _on(features, "3", job="MNIST form: features of one candidate label"),
    ]


def _on(asked: Asked, wanted: str | None = None, **of: object) -> Asked:
    """The same for one network, job or case, which its title then names."""
    names = [f"{name} {value}" if isinstance(value, int | float) else str(value) for name, value in of.items()]
    return replace(
        asked,
        what=f"{asked.what}: {', '.join(names).replace('*', '')}",
        of={**asked.of, **of},
        wanted=asked.wanted if wanted is None else wanted,
    )


ASKED = [*_whitening(), *_fim(), *_geodesic(), *_thesis(), *_gradnet()]
