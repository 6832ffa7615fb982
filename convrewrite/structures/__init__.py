"""What a replacement is: families of linear replacements, how their stages are built, and the algebra of their kernels."""

from convrewrite.structures.algebra import compose, composed_kernel, initial_kernels, join_groups, split_groups, through
from convrewrite.structures.discovery import discover
from convrewrite.structures.families.asymmetric import STRUCTURE as ASYMMETRIC
from convrewrite.structures.families.grouped import STRUCTURE as GROUPED
from convrewrite.structures.families.separable import STRUCTURE as SEPARABLE
from convrewrite.structures.lowering import (
    branch_kernels,
    branch_specs,
    lowerings,
    make_option,
    option_cost,
    stage_specs,
)
from convrewrite.structures.structure import Option, Setting, Stage, Structure

__all__ = [
    "ASYMMETRIC",
    "GROUPED",
    "SEPARABLE",
    "Option",
    "Setting",
    "Stage",
    "Structure",
    "branch_kernels",
    "branch_specs",
    "compose",
    "composed_kernel",
    "discover",
    "initial_kernels",
    "join_groups",
    "lowerings",
    "make_option",
    "option_cost",
    "split_groups",
    "stage_specs",
    "through",
]
