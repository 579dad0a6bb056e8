"""Readings of a study that nobody sat: drawn conduct as `make_rows` would give it."""

from cxr_jax.study import behaviour

READERS, CASES = 4, 24


def drawn_rows(protocol, readers=READERS, cases=CASES):
    """Readings as `make_rows` gives them, from drawn conduct instead of sittings."""
    abnormal = [number % 2 == 0 for number in range(cases)]
    conduct = behaviour.draw_conduct(
        behaviour.Effects(), protocol.arms, readers, abnormal, [protocol.seed, 1]
    )
    rows = []
    for arm_index, arm in enumerate(protocol.arms):
        for reader in range(readers):
            for case in range(cases):
                place = arm_index, reader, case
                caught = int(conduct.caught[place])
                is_audited = case % 3 == 0 and arm != "manual"
                row = {
                    "reader": reader + 1,
                    "arm": arm,
                    "session": (arm_index + reader) % 3 + 1,
                    "position": (case * 7 + reader) % cases + 1,
                    "case": case + 1,
                    "truth": int(abnormal[case]),
                    "planted": int(case % 3 == 0),
                    "kind": ("add", "drop", "side", "hedge")[case // 3 % 4]
                    if case % 3 == 0
                    else None,
                    "active_s": round(float(2.718281828 ** conduct.log_seconds[place]), 3),
                    "wall_s": None,
                    "confidence": int(conduct.confidence[place]),
                    "detected_label": caught if is_audited else None,
                    "detected_flag": caught if is_audited else None,
                    "false_flags": 0 if arm != "manual" else None,
                    "carried": 1 - caught if case % 3 == 0 else None,
                    "corrected": caught if case % 3 == 0 else None,
                    "no_side": 0 if case % 3 == 0 else None,
                    "true_items": 20 if arm != "manual" else None,
                    "natural_errors": 0,
                    "natural_carried": 0,
                    "state": "signed",
                    "practice": 0,
                    "block": case % 3 + 1,
                    "idle_s": 0.0,
                    "paused_s": 0.0,
                    "clock_ok": 1,
                    "untold_s": 0.0,
                    "reopened": 0,
                    "true_positive": 2 + (case + reader) % 2,
                    "false_positive": (case + arm_index) % 2,
                    "false_negative": reader % 2,
                    "skip_reason": None,
                }
                for number, label in enumerate(protocol.suspicion_labels):
                    # Shifted by label, so that each has areas of its own.
                    score = float(conduct.suspicion[place]) + 0.3 * ((case + number) % 3)
                    row |= {f"rating_{label}": round(score, 4), f"truth_{label}": row["truth"]}
                rows.append(row)
    return rows
