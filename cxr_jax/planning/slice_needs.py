"""What programs need on a TPU slice that is not there.

libtpu compiles them, so memory and traffic are as they will be.
"""

import contextlib
import math
from typing import TYPE_CHECKING, Any

from cxr_jax.planning import costs, hlo
from cxr_jax.planning.programs import GIB, Needs, Program, parts, place
from cxr_jax.runtime.trees import Tree

if TYPE_CHECKING:
    import jax


def needs_on_slice(
    program: Program, device: "jax.Device", mesh: "jax.sharding.Mesh | None" = None
) -> Needs:
    """Compile one program for the devices of a slice and count what a call of it needs.

    Args:
        program: as the run computes it.
        device: of the slice; the only one, where there is no mesh.
        mesh: of all its devices.

    Returns:
        Bytes by what they hold. Of a program that the compiler refuses for want of memory: those of its arguments, and
        why.
    """
    import jax

    bytes_held = parts(place({**program.arguments, "waiting": program.waiting}, mesh), mesh)
    bytes_by_kind = {kind: byte_count for kind, byte_count in bytes_held.items() if byte_count}
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        arguments = place(program.arguments, mesh)
        if mesh is None:
            arguments = _on_device(arguments, device)
        traced = program.step.trace(*arguments.values())
        flops = costs.flops_of(traced.jaxpr.jaxpr, program.turns)
        lowered = traced.lower(lowering_platforms=("tpu",))
        del traced  # the compiler needs the host's memory for itself
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            reason = " ".join(str(error).split())
            # All other errors are none of memory, and no verdict.
            if "RESOURCE_EXHAUSTED" not in reason:
                raise
            refused = first_sentences(reason)
            return Needs(
                program.name, bytes_by_kind, flops, program.tokens, {}, {}, refused=refused
            )
    text = compiled.as_text()
    padding = hlo.padding(hlo.parse(text))
    bytes_by_kind |= _bytes_of_compiler(compiled.memory_analysis(), padding)
    traffic = costs.collectives(text, 1 if mesh is None else mesh.size, program.mean_turns)
    return Needs(
        program.name, bytes_by_kind, flops, program.tokens, *traffic.used(), waste=describe(padding)
    )


def _on_device(arguments: Tree, device: "jax.Device") -> Tree:
    """The abstract arguments, said to lie on one device that is not there."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(device)

    def put(array: "jax.ShapeDtypeStruct") -> "jax.ShapeDtypeStruct":
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(put, arguments)


def _bytes_of_compiler(memory: Any, padding: hlo.Padding) -> dict[str, int]:
    """What the compiler adds to the arguments, by what it holds."""
    return {
        "padding": padding.arguments.padded - padding.arguments.elements,
        "temporary": memory.temp_size_in_bytes,
        # Of the results, what takes over an argument's memory (donated state) is no extra.
        "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


def first_sentences(reason: str, most: int = 300) -> str:
    """Return what a compiler says of memory in short: its first sentences, up to so many characters."""
    sentences = reason.partition("RESOURCE_EXHAUSTED:")[2].strip() or reason
    # What follows is a list of the largest arrays.
    sentences = sentences.partition("Largest program allocations")[0].strip()
    return sentences if len(sentences) <= most else sentences[:most].rstrip() + " .."


def describe(padding: hlo.Padding) -> str:
    """Say in one line what padding takes."""
    made = padding.made
    share = made.padded / made.elements - 1 if made.elements else 0.0
    line = f"{share:.0%} of what it writes"
    if padding.worst:
        sizes = padding.worst_sizes
        factor = math.ceil(10 * sizes.padded / sizes.elements) / 10
        line += f"; most by {padding.worst}: {factor:g} times its {sizes.elements / GIB:.2f} GiB"
    return line
