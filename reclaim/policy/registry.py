"""Policies by name: the built-in policies, and those of other packages.

A package provides a policy under the entry point group ``kvmhost.policies``: the name of
the entry point is the name of the policy, the object is a class or function that takes
the number of pages and keyword options and returns a
:class:`~kvmhost.reclaim.policy.base.Policy`. docs/policies.md has an example.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy.base import Policy
from kvmhost.suggest import unknown_name

__all__ = ["BUILT_IN", "GROUP", "Offer", "create", "offers", "options_of"]

GROUP = "kvmhost.policies"
#: Name: module and class.
BUILT_IN = {
    "lru_gen": "kvmhost.reclaim.policy.lru_gen:LruGen",
    "classic": "kvmhost.reclaim.policy.classic:Classic",
    "age": "kvmhost.reclaim.policy.age:AgePolicy",
    "random": "kvmhost.reclaim.policy.random:Random",
}
_MEMBERS = (
    "plan",
    "refaulted",
    "age",
    "victims",
    "evicted",
    "sizes",
    "counters",
    "explain",
)

Factory = Callable[..., Policy]


@dataclasses.dataclass(frozen=True)
class Offer:
    """A policy that can be created, or the reason why not.

    :param source: "built in", or package and version
    :param reason: why it cannot be created; "" if it can
    """

    name: str
    source: str
    target: str
    reason: str = ""

    @property
    def works(self) -> bool:
        """Whether the policy can be created."""
        return not self.reason


def offers() -> dict[str, Offer]:
    """Return all policies by name, the built-in policies first; imports all plug-ins.

    A plug-in cannot replace a policy of the same name; a plug-in that cannot be loaded is
    listed with its error.
    """
    found = _listed()
    return {
        name: _checked(offer) if offer.works and name not in BUILT_IN else offer
        for name, offer in found.items()
    }


def _listed() -> dict[str, Offer]:
    """Return every policy by name, with no plug-in imported."""
    found = {name: Offer(name, "built in", target) for name, target in BUILT_IN.items()}
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        source = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"
        if point.name in found:
            taken = found[point.name].source
            shown = f"{point.name}@{source.split()[0]}"
            found[shown] = Offer(shown, source, point.value, f"the name is taken ({taken})")
        else:
            found[point.name] = Offer(point.name, source, point.value)
    return found


def create(name: str, n_pages: int, options: Mapping[str, Any] | None = None) -> Policy:
    """Create a policy.

    :param options: keyword arguments of its class; see :func:`options_of`
    :raises LayoutError: for an unknown name, an unknown option, a rejected value, or a
        plug-in that does not work
    """
    offer = _working(name)
    factory = _load(offer.target)
    known = _parameters(factory)
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        takes = ", ".join(known) or "no options"
        raise LayoutError(f"policy {name}: no option {unknown[0]!r} (it takes: {takes})")
    policy = factory(n_pages, **dict(options or {}))
    missing = [member for member in _MEMBERS if not callable(getattr(policy, member, None))]
    if missing:
        raise LayoutError(f"policy {name} ({offer.source}): has no method {missing[0]}")
    return policy


def options_of(name: str) -> dict[str, Any]:
    """Return a policy's options with their defaults.

    :raises LayoutError: as :func:`create`
    """
    return _parameters(_load(_working(name).target))


def _working(name: str) -> Offer:
    """Return the policy of a name; of all plug-ins no other one is imported."""
    if name in BUILT_IN:
        return Offer(name, "built in", BUILT_IN[name])
    listed = _listed()
    if name not in listed:
        names = [offer.name for offer in listed.values() if offer.works]
        raise LayoutError(unknown_name("policy", name, names))
    offer = listed[name]
    offer = _checked(offer) if offer.works else offer
    if not offer.works:
        raise LayoutError(f"policy {name!r} ({offer.source}): {offer.reason}")
    return offer


def _checked(offer: Offer) -> Offer:
    try:
        factory: object = _load(offer.target)
    # An exception of any kind in a plug-in's import must not affect other policies.
    except Exception as error:  # noqa: BLE001
        return dataclasses.replace(offer, reason=f"{type(error).__name__}: {error}")
    if not callable(factory):
        return dataclasses.replace(offer, reason=f"{offer.target} cannot be called")
    return offer


def _load(target: str) -> Factory:
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    factory: Factory = found
    return factory


def _parameters(factory: Factory) -> dict[str, Any]:
    """Return names and defaults of a factory's parameters after the number of pages."""
    parameters = list(inspect.signature(factory).parameters.values())[1:]
    named = (p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return {p.name: p.default for p in named}
