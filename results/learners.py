"""Learners in context that need more training than a page has time for.

Three parts, row by row (icl.synthetic, icl.learners):

- ``regressor``: a GPT-2 trained on linear regression, and classical answers, by
  the number of examples (the design of Garg et al. 2022, smaller);
- ``depth``: linear transformers of one to four layers beside as many steps of
  gradient descent (the setting of von Oswald et al. 2023);
- ``covariance``: three layers on inputs of unequal variance (the protocol of Ahn
  et al. 2023, batches of 500 instead of 4,000).

Columns: ``error`` is the mean squared error over the mean square of the labels
for ``regressor``, half the mean squared error otherwise, on ``TASKS`` new tasks;
``distance`` is the mean squared distance to the transformer's predictions on the
same scale; ``typical`` the mean error without the worst task in a thousand and
``largest`` the error of the worst; ``cosine`` and ``identity`` those of the layers'
key-query matrix with the inverse covariance and with the identity, mean absolute
value. Rows that the table has are not computed again.
"""

import torch

from icl import learners, synthetic
from icl.results import provenance, read_table, table_path, write_table

TABLE = "learners"
TASKS = 20_000
REGRESSOR = dict(dim=4, examples=12, width=64, layers=3, heads=4)
REGRESSOR_TRAINING = dict(steps=5_000, learning_rate=2e-3, batch=64)
DEPTH = dict(dim=10, examples=10, steps=1_500, learning_rate=0.03, batch=512)
COVARIANCE = dict(dim=5, examples=20, layers=3, steps=10_000, batch=500)
SPECTRUM = 1.0, 0.5, 0.25, 0.125, 0.0625


def split(X, y):
    """The last example becomes the query: ``(X, y, x), target``."""
    return (X[:, :-1], y[:, :-1], X[:, -1]), y[:, -1]


# --- a GPT-2 on linear regression -------------------------------------------


def shifts(dim):
    """What the tasks may look like: ``{name: draw(generator, batch, examples)}``."""
    g = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(dim, dim, generator=g))[0]
    values = 1 / torch.arange(1, dim + 1) ** 2
    skew = (U * (dim * values / values.sum())) @ U.T

    def draw(covariance=None, noise=0.0):
        def tasks(generator, batch, examples):
            X = synthetic.sample_inputs(generator, batch, examples, dim, covariance)
            return X, synthetic.linear_labels(generator, X, noise=noise)

        return tasks

    return {
        "as trained": draw(),
        "inputs doubled": draw(4 * torch.eye(dim)),
        "noisy labels": draw(noise=0.5),
        "skewed inputs": draw((skew + skew.T) / 2),
    }


def best_rate(steps, X, y):
    """The learning rate of a grid with the least mean error over all prefixes."""

    def error(rate):
        eta = torch.full((steps,), rate)
        f = synthetic.at_every_prefix(synthetic.gradient_descent, X, y, eta=eta)
        return (f - y).square().mean().item()

    return min([0.05 * n for n in range(1, 25)], key=error)


def answers(X, y, rates):
    """Predictions of the classical learners at every prefix, ``{name: (B, N)}``."""
    every = synthetic.at_every_prefix
    found = {
        "least squares": every(synthetic.least_squares, X, y),
        "ridge": every(synthetic.ridge, X, y, penalty=0.25),
        "3 neighbours": every(synthetic.nearest_neighbours, X, y),
    }
    for steps, rate in rates.items():
        eta = torch.full((steps,), rate)
        found[f"gd {steps}"] = every(synthetic.gradient_descent, X, y, eta=eta)
    return found


def regressor(seed):
    d, N = REGRESSOR["dim"], REGRESSOR["examples"]
    g = torch.Generator().manual_seed(seed)
    model = learners.InContextRegressor(**REGRESSOR, seed=seed)
    draws, batch = shifts(d), REGRESSOR_TRAINING["batch"]

    def loss():
        X, y = draws["as trained"](g, batch, N)
        return (model(X, y) - y).square().mean()

    learners.train(
        loss,
        model.parameters(),
        REGRESSOR_TRAINING["steps"],
        REGRESSOR_TRAINING["learning_rate"],
        clip=1.0,
        schedule=learners.warm_cosine,
    )
    test = torch.Generator().manual_seed(10_000 + seed)
    tune = draws["as trained"](test, 2000, N)
    rates = {steps: best_rate(steps, *tune) for steps in (1, 4)}
    for name, draw in draws.items():
        X, y = draw(test, TASKS // 4, N)
        with torch.no_grad():
            mine = model(X, y)
        unit = y.square().mean()
        for learner, f in {"transformer": mine, **answers(X, y, rates)}.items():
            error = (f - y).square().mean(0) / unit
            distance = (f - mine).square().mean(0) / unit
            for i in range(N):
                yield dict(
                    setting=name,
                    learner=learner,
                    examples=i,
                    error=error[i].item(),
                    distance=distance[i].item(),
                )


# --- linear transformers -----------------------------------------------------


def halved(predict, task, target):
    """Half the squared error of every task."""
    return 0.5 * (predict(*task) - target).square()


def descents(layers, root=None):
    """Gradient descent and GD++ with free rates: ``{name: (predict, rates)}``."""
    found = {}
    for name in ("gd", "gd++"):
        # unequal starts: rates that start equal stay equal
        eta = torch.linspace(0.2, 0.6, layers)
        rates = [eta, torch.linspace(0.0, 0.1, layers)][: 1 + (name == "gd++")]

        def predict(X, y, x, rates=rates):
            if root is not None:
                X, x = X @ root, x @ root
            return synthetic.gradient_descent(X, y, x, *rates)

        found[name] = predict, [r.requires_grad_() for r in rates]
    return found


def row(setting, learner, layers, losses, **others):
    easiest = losses.sort().values[: -len(losses) // 1000]
    return dict(
        setting=setting,
        learner=learner,
        layers=layers,
        error=losses.mean().item(),
        typical=easiest.mean().item(),
        largest=losses.max().item(),
        **others,
    )


def depth(seed):
    d, N = DEPTH["dim"], DEPTH["examples"]
    g = torch.Generator().manual_seed(seed)

    def draw(batch, generator):
        X = synthetic.sample_inputs(
            generator, batch, N + 1, d, torch.eye(d) / 12, "uniform"
        )
        return split(X, synthetic.linear_labels(generator, X))

    test = draw(TASKS, torch.Generator().manual_seed(10_000 + seed))
    for layers in (1, 2, 3, 4):
        fixed = draw(4096, g)
        for name, (predict, rates) in descents(layers, 12**0.5 * torch.eye(d)).items():
            learners.minimise(
                lambda p=predict, f=fixed: halved(p, *f).mean(), rates, 60
            )
            with torch.no_grad():
                yield row("uniform", name, layers, halved(predict, *test))
        model = learners.LinearTransformer(
            *learners.random_weights(g, layers, d, std=0.05)
        )
        learners.train(
            lambda m=model: halved(m, *draw(DEPTH["batch"], g)).mean(),
            model.parameters(),
            DEPTH["steps"],
            DEPTH["learning_rate"],
            clip=0.1,
            schedule=learners.warm_cosine,
        )
        with torch.no_grad():
            yield row("uniform", "transformer", layers, halved(model, *test))


def covariances(dim):
    """One spectrum along the axes, turned, and none: ``{name: Σ}``; mean variance 1."""
    values = torch.tensor(SPECTRUM[:dim])
    values = dim * values / values.sum()
    g = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(dim, dim, generator=g))[0]
    turned = (U * values) @ U.T
    return {
        "along the axes": torch.diag(values),
        "turned": (turned + turned.T) / 2,
        "isotropic": torch.eye(dim),
    }


def cosine(A, B):
    """The cosine of two matrices as vectors, without its sign."""
    return ((A * B).sum() / (A.norm() * B.norm())).abs().item()


def covariance(seed):
    d, N, layers = (COVARIANCE[key] for key in ("dim", "examples", "layers"))
    g = torch.Generator().manual_seed(seed)
    for name, sigma in covariances(d).items():
        inverse = torch.linalg.inv(sigma)
        inverse = (inverse + inverse.T) / 2

        def draw(batch, generator, sigma=sigma, inverse=inverse):
            X = synthetic.sample_inputs(generator, batch, N + 1, d, sigma)
            return split(X, synthetic.linear_labels(generator, X, inverse))

        test = draw(TASKS, torch.Generator().manual_seed(10_000 + seed))
        fixed = draw(4096, g)
        for root in (None, torch.linalg.cholesky(inverse)):
            for label, (predict, rates) in descents(layers, root).items():
                learners.minimise(
                    lambda p=predict, f=fixed: halved(p, *f).mean(), rates, 60
                )
                label = label if root is None else f"preconditioned {label}"
                with torch.no_grad():
                    yield row(name, label, layers, halved(predict, *test))
        model = learners.LinearTransformer(
            *learners.random_weights(g, layers, d, std=0.01)
        )
        learners.train(
            lambda m=model, draw=draw: halved(m, *draw(COVARIANCE["batch"], g)).mean(),
            model.parameters(),
            COVARIANCE["steps"],
            learning_rate=1e-3,
            betas=(0.9, 0.9),
            clip=0.1,
        )
        keys = [Q[:d, :d] for Q in model.Q.detach()]
        with torch.no_grad():
            yield row(
                name,
                "transformer",
                layers,
                halved(model, *test),
                cosine=sum(cosine(K, inverse) for K in keys) / layers,
                identity=sum(cosine(K, torch.eye(d)) for K in keys) / layers,
            )


PARTS = {
    "depth": (depth, 5),
    "regressor": (regressor, 5),
    "covariance": (covariance, 5),
}
SETTINGS = {
    "depth": DEPTH,
    "regressor": REGRESSOR | REGRESSOR_TRAINING,
    "covariance": COVARIANCE | {"spectrum": SPECTRUM},
}


def main():
    rows, about = [], {}
    if table_path(TABLE).exists():
        table, about = read_table(TABLE)
        rows = table.to_dict("records")
    done = {(r["part"], r["seed"]) for r in rows}
    for name, (part, seeds) in PARTS.items():
        for seed in range(seeds):
            if (name, seed) in done:
                continue
            rows += [{"part": name, "seed": seed, **found} for found in part(seed)]
            about[f"{name}/{seed}"] = provenance(
                data="drawn from the seed",
                seeds=[seed],
                tasks=TASKS,
                settings=SETTINGS[name],
            )
            write_table(TABLE, [short(r) for r in rows], about)
            print(name, seed, flush=True)


def short(found):
    """Six digits are more than any of these numbers means."""
    return {
        k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in found.items()
    }


if __name__ == "__main__":
    main()
