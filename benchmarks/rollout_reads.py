"""What the turns of a rollout cost, by counting: reads of all weights, bytes that a device reads, kept keys.

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/rollout_reads.py --config=experiments/rl.py:nv_reason_3b

Lengths of completions are drawn (lognormal, spread 0.5, cut at max_completion; those of the published traces have a
mean of about 620 tokens), and the decode loop is followed: in each turn, and over all devices together, as many steps
as the longest completion has tokens, at each of which a device reads all weights of the decoder once, the prompts'
keys once, and the own keys of the rows that its stage holds. Nothing is compiled, and no time is measured.

2026-11-30, the command above; sampled in the 8 turns that its learner needs (`rl.micro_batches=8` cut both before), and
in the turns that `rl.sample_micro_batches=0` chooses, means of 20 draws:

                    weight reads         read a device, GB    own keys at most, GiB
    mean length 8 turns  1 turn  ratio   8 turns  1 turn  ratio    8 turns  1 turn
            450  11,385   1,750    6.5    74,539  14,083    5.3        1.0     7.9
            620  13,906   1,800    7.7    91,925  15,498    5.9        1.0     7.9
            900  14,400   1,800    8.0    96,125  18,181    5.3        1.0     7.9

What that takes, 2026-11-30, by the code of 2fcc3e5: the same config's programs compiled by `python -m cxr_jax.plan
--devices=8 --config.rl.micro_batches=8 --config.rl.sample_micro_batches=8` (and =1), computed in float32 as a plan's
temporary memory is, GiB a device; 5.3 of parameters and of the optimizer lie beside it:

    rollout in 8 turns        27.7     (all weights twice 23.0, own keys 2.0 at most)
    rollout in 1 turn         39.2     (weights once 11.5, own keys 15.8 beside the 9.9 that they grow out of)
    update                    23.8

So one turn takes 11.4 GiB more than eight (41 %), and the rollout, not the update, is what the run needs most for. In
bfloat16, the type of the run, weights and keys are half as large: 13.9 and 19.6 by halving, which was not compiled.
The rule bounds keys by a quarter of the device's memory; it does not hold a rollout to what its update takes.
"""

import jax
import numpy as np
from absl import app, flags

from cxr_jax.config import command_line, schema
from cxr_jax.config.sections import RunConfig
from cxr_jax.inference import compaction
from cxr_jax.planning import programs

flags.adopt_module_key_flags(command_line)
_DEVICES = flags.DEFINE_integer("devices", 8, "Devices that divide the rows.")
_TURNS = flags.DEFINE_integer("turns", 8, "Turns to compare with.")

MEANS, SPREAD, DRAWS = (450, 620, 900), 0.5, 20
GIB = 2**30


def read_in_a_turn(
    lengths: np.ndarray, group: int, max_tokens: int, width: int, layer_bytes: int, layers: int
) -> tuple[int, float]:
    """Follow one turn.

    Args:
        lengths: int [devices, R], of the completions.
        width: slots of a prompt.
        layer_bytes: of the keys of a token in a layer.

    Returns:
        (steps, bytes of keys that a device reads).
    """
    steps, keys, start = 0, 0.0, 0
    for stage, until in enumerate(compaction.stage_ends(max_tokens)):
        # The device with the most rows left decides for all.
        alive = (lengths > start).sum(axis=1).max()
        if not alive:
            break
        counts = compaction.stage_rows(lengths.shape[1], 1, stage, layers)
        rows = min(count for count in counts if count >= alive)
        steps_here = min(until, lengths.max()) - start
        prompts = lengths.shape[1] // group
        keys += steps_here * (rows * until + min(prompts, rows) * width) * layer_bytes * layers
        steps, start = steps + steps_here, until
    return steps, keys


def main(_: list[str]) -> None:
    """Print a row a mean length."""
    config = command_line.CONFIG.value
    schema.check_values(config)
    settings = RunConfig.from_config(config)
    chosen = programs.with_turns(settings, _DEVICES.value, None).rollout.sample_micro_batches
    shapes, rollout = programs.Shapes(settings), settings.rollout
    text = shapes.model_config.text
    type_bytes = np.dtype(shapes.trainable.dtype).itemsize
    slot_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * type_bytes
    # A tied table is read as the head; one row a token of the embedding beside is nothing.
    weights = type_bytes * sum(leaf.size for leaf in jax.tree.leaves(shapes.params["text"]))
    rows = rollout.prompts_per_step * rollout.oversample * rollout.group_size // _DEVICES.value
    print(
        f"{weights / 1e9:.2f} GB of weights, {slot_bytes:,} bytes of keys a token; "
        f"{rows} rows a device, in {_TURNS.value} and {chosen} turns"
    )
    for mean in MEANS:
        counted = {}
        for turns in (_TURNS.value, chosen):
            generator, counts = np.random.default_rng(0), []
            for _ in range(DRAWS):
                drawn = generator.lognormal(
                    np.log(mean) - SPREAD**2 / 2, SPREAD, (_DEVICES.value, rows)
                )
                lengths = np.clip(drawn.astype(int), 1, settings.max_completion)
                of_turns = [
                    read_in_a_turn(
                        part,
                        rollout.group_size,
                        settings.max_completion,
                        shapes.prompt_width,
                        slot_bytes // text.num_hidden_layers,
                        text.num_hidden_layers,
                    )
                    for part in np.split(lengths, turns, axis=1)
                ]
                steps, keys = np.sum(of_turns, axis=0)
                counts.append((steps, (steps * weights + keys) / 1e9))
            kept = rows // turns * settings.max_completion * slot_bytes / GIB
            counted[turns] = (*np.mean(counts, axis=0), kept)
        many, few = counted[_TURNS.value], counted[chosen]
        print(
            f"{mean:15}{many[0]:8,.0f}{few[0]:8,.0f}{many[0] / few[0]:7.1f}"
            f"{many[1]:10,.0f}{few[1]:8,.0f}{many[1] / few[1]:7.1f}{many[2]:11.1f}{few[2]:8.1f}"
        )


if __name__ == "__main__":
    app.run(main)
