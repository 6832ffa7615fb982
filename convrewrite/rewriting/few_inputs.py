"""Fits to few inputs: where one has learned its inputs by heart, what less trust in them gives, down to the weights alone."""

from dataclasses import replace
from typing import TYPE_CHECKING

from convrewrite.fitting import Fit, doubtful, fit, left_unexplained, lesser_trusts, solving, targets_of, told
from convrewrite.rewriting.kernels import composed_kernel
from convrewrite.structures import Option, Structure, initial_kernels

if TYPE_CHECKING:
    from convrewrite.rewriting.site_fit import SiteFit


def believed(site_fit: "SiteFit", structure: Structure, option: Option, found: Fit) -> Fit:
    """``found``, or where it is doubtful the fit of the same option with less trust in the data, or with none, that has the
    least error on held-out inputs."""
    if not site_fit.seen or site_fit.unseen is site_fit.seen:
        return found
    seen, unseen = site_fit.seen, site_fit.unseen
    stages = structure.stages(site_fit.site.folded_spec.per_group, option.parameters)
    kernel = composed_kernel(found.kernels, stages, site_fit.site.spec.groups)
    if not doubtful(seen[0].count, site_fit.patch, left_unexplained(kernel, seen), found.unexplained):
        return found
    least = min(found, _from_weights(site_fit, structure, option), key=lambda each: each.unexplained)
    with solving(site_fit.site.name):
        for trusts in zip(*(lesser_trusts(moments, site_fit.fitted_examples) for moments in seen), strict=True):
            targets = targets_of(site_fit.kernel, site_fit.site.spec, seen, trusts)
            other = fit(
                structure, site_fit.site.folded_spec, option.parameters, targets, seen, unseen, roots=site_fit.roots
            )
            if other.unexplained < least.unexplained:
                least = replace(other, trusts=trusts)
    return least


def _from_weights(site_fit: "SiteFit", structure: Structure, option: Option) -> Fit:
    """The decomposition of the kernel alone; only its bias knows the inputs."""
    spec = site_fit.site.folded_spec
    kernels = initial_kernels(structure, site_fit.kernel, spec, option.parameters)
    groups = zip(*(stage.chunk(spec.groups) for stage in kernels), strict=True)
    stages = structure.stages(spec.per_group, option.parameters)
    return told([tuple(group) for group in groups], stages, site_fit.seen, site_fit.unseen)
