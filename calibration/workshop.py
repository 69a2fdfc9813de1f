"""A source bundle, and the quantised graphs that recipes make of it while the right recipe is sought."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from metaembed.runtime.encoder import Encoder
from metaembed.runtime.errors import BundleError
from metaembed.runtime.manifest import LANGUAGE, SCORER, VISION, Bundle, cpu_graph
from metaembed.runtime.weights import place_file

from . import smoothing
from .formats import Format
from .linears import find_groups
from .packing import pack_weights
from .qdq import Weights, insert_qdq
from .recipe import Recipe
from .sessions import ExactSession, RememberingSession
from .smoothing import Smoothing
from .token_table import find_table, quantise_table

SOURCES = "work/source"  # where the source's weight files stand, linked, while graphs are built


class Workshop:
    """Builds the graphs of recipes in ``folder``, whose ``work`` subfolder holds what they share.

    Attributes:
        runnable: for the vision and the language graph, the one that ONNX Runtime's CPU provider can run: the float32
            twin where there is one.
        groups: the groups of Linears of the runnable graphs, in running order. The deployed graphs have the same.

    Raises:
        BundleError: a graph and its twin hold different groups, so that a recipe for one would not fit the other.
    """

    def __init__(self, bundle: Bundle, folder: Path, form: Format, threads: int = 0) -> None:
        self.bundle, self.folder, self.form, self.threads = bundle, folder, form, threads
        files = bundle.manifest.files
        self.names = [name for name in files if name.endswith(".onnx") and name != SCORER]
        self.runnable = {name: cpu_graph(name) if cpu_graph(name) in files else name for name in (VISION, LANGUAGE)}
        self.groups = find_groups(self.runnable_graphs())
        deployed = find_groups({name: self.load(name) for name in self.runnable})
        if [group.name for group in deployed] != [group.name for group in self.groups]:
            raise BundleError(f"the graphs of {bundle.folder} and their float32 twins do not hold the same Linears")
        self._kind = deployed[0].kind
        self._weights: tuple[Sequence[Smoothing], Weights] | None = None
        self._sessions: dict[str, tuple[object, ExactSession | RememberingSession]] = {}
        (folder / SOURCES).mkdir(parents=True)
        for name in files:
            if name.startswith("weights/"):
                place_file(bundle.path(name), folder / SOURCES / Path(name).name)

    def load(self, name: str) -> ir.Model:
        """A graph of the source; its weights lie in the bundle."""
        return ir.load(self.bundle.path(name))

    def runnable_graphs(self) -> dict[str, ir.Model]:
        return {name: self.load(runnable) for name, runnable in self.runnable.items()}

    def weights(self, smoothings: Sequence[Smoothing]) -> Weights:
        """Codes and smoothed values, kept between recipes that differ in groups alone."""
        if self._weights is None or self._weights[0] != smoothings:
            changes = smoothing.changes_of(smoothings)
            self._weights = smoothings, Weights(self.folder, self.form, changes)
        return self._weights[1]

    def build(self, name: str, recipe: Recipe) -> ir.Model:
        """One graph as the recipe has it; its weights lie in ``folder``."""
        model, weights = self.load(name), self.weights(recipe.smoothings)
        amax = {group.name: group.amax for group in recipe.groups if group.quantised}
        groups = [group for group in find_groups({name: model}) if group.name in amax]
        quantised = {linear.stored.name for group in groups for linear in group.linears}
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _placed(value.const_value)
                if value.name in weights.changes and value.name not in quantised:
                    value.const_value = weights.smoothed(value)
        if recipe.token_table and (table := find_table(model)):
            quantise_table(model.graph, table, weights, self._kind)
        insert_qdq(model, groups, amax, weights, self._kind, recipe.twice)
        return model

    def encoder(self, recipe: Recipe) -> Encoder:
        """An encoder that simulates the recipe exactly. The one before it may no longer be used."""
        return Encoder(self.bundle, self._session(VISION, recipe), self._session(LANGUAGE, recipe))

    def source_encoder(self) -> Encoder:
        """The source itself, at the same level of optimisation."""
        models = self.runnable_graphs().values()
        return Encoder(self.bundle, *(ExactSession(m, self.bundle.folder, threads=self.threads) for m in models))

    def pack(self, recipe: Recipe) -> dict[str, ir.Model]:
        """Every graph of the recipe, twins included, its weights packed into ``folder/weights``."""
        models = {name: self.build(name, recipe) for name in self.names}
        pack_weights(models.values(), self.folder, self.form.name)
        return models

    def _session(self, name: str, recipe: Recipe) -> ExactSession | RememberingSession:
        """The last session of this graph again, when the recipe changes nothing in it."""
        own = {group.name for group in self.groups if group.graph == name}
        key = (
            recipe.smoothings,
            recipe.token_table,
            tuple(group for group in recipe.groups if group.quantised and group.name in own),
        )
        if name not in self._sessions or self._sessions[name][0] != key:
            self._sessions.pop(name, None)  # free it first: two at once may not fit in memory
            session = ExactSession(self.build(self.runnable[name], recipe), self.folder, threads=self.threads)
            self._sessions[name] = key, RememberingSession(session) if name == VISION else session
        return self._sessions[name][1]


def _placed(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    location = f"{SOURCES}/{Path(tensor.location).name}"
    kept = {"shape": tensor.shape, "name": str(tensor.name)}
    return ir.ExternalTensor(location, tensor.offset, tensor.nbytes, tensor.dtype, **kept)
