"""Splice modules in again where they were, as they are: the inverse of ``forget``.

Nothing is built, verified or trained here. Hosts capture their graphs anew at their next calls.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from surgery.host import Choice, Operation, install, state_of
from surgery.interop import encoder_fastpath, huggingface, keep_unpacked
from surgery.plugin import settle_advance
from surgery.splicer.late_division import LateDivision
from surgery.splicer.record import Report, look_up, record_of, reports, tell_of_calls


@dataclass(frozen=True)
class Spliced:
    """What is spliced into a model at one time.

    Attributes:
        reports: the splices by name, in order.
        modules: the inserted modules by path.
        weights: for each host, what its sites run with (``HostState.weights``).
        kept: the parameters of the base that are trained along.
        choice: which splices are on.
    """

    reports: dict[str, Report]
    modules: dict[str, nn.Module]
    weights: dict[str, dict[tuple[str, str], frozenset[str]]]
    kept: list[str]
    choice: Choice

    @classmethod
    def into(cls, model: nn.Module) -> Spliced:
        """Return what is spliced into ``model`` now."""
        found = dict(reports(model))
        every = [i for report in found.values() for i in report.inserted]
        states = {i.site.path: state_of(model.get_submodule(i.site.path)) for i in every}
        return cls(
            found,
            {i.path: model.get_submodule(i.path) for i in every},
            {path: dict(state.weights) for path, state in states.items() if state is not None},
            list(look_up(model).kept),
            look_up(model).switches.default,
        )

    def put_back(self, model: nn.Module) -> None:
        """Splice into ``model`` again what has been taken out since."""
        record = record_of(model)
        hosts: dict[str, dict[str, Operation]] = {}
        for report in self.reports.values():
            for i in report.inserted:
                path, _, child = i.path.rpartition(".")
                host = model.get_submodule(path)
                assert i.site.host is not None
                install(host, i.site.host).through |= i.site.host.through
                module = getattr(host, child, None)
                if module is None:
                    module = self.modules[i.path].train(host.training)
                else:
                    delattr(host, child)  # to stand in the order of the splices again
                host.add_module(child, module)
                record.closed |= encoder_fastpath.close(model, path)
                named = hosts.setdefault(path, {})
                operation = named.setdefault(report.name, Operation(report.name, [], []))
                operation.edits.append(i.edit)
                operation.children.append(child)
        for path, operations in hosts.items():
            state = state_of(model.get_submodule(path))
            assert state is not None
            state.operations, state.weights = operations, self.weights[path] | state.weights
            state.switches, state.divide = record.switches, LateDivision(model)
            state.refresh()
        record.reports, record.kept = dict(self.reports), list(self.kept)
        record.settle()
        record.switches.default = self.choice
        settle_advance(model)
        tell_of_calls(model)
        huggingface.let_train(model, adapted=True)
        keep_unpacked(model, adapted=True)
