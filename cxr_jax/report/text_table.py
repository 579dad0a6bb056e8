"""The results as a plain table for the terminal."""

CAVEAT = {
    "phantom": "Phantom results: they say nothing about patients.",
    "files": "Real films read by a model trained on phantoms only: these numbers say nothing about patients.",
}


def text_table(tables, comparisons, kind) -> str:
    """The results as a plain table for the terminal."""
    ci = lambda v: "-" if v["value"] is None else f"{v['value']:.3f} [{v['lo']:.3f}, {v['hi']:.3f}]"
    rows = [
        (
            "model",
            "set",
            "n",
            "Jaccard [95 % CI]",
            "macro-F1 [95 % CI]",
            "micro-F1",
            "swapped macro-F1",
            "parse failures",
            "trace = answer",
            "trace = truth",
        )
    ]
    for m, sets in tables.items():
        for s, t in sets.items():
            swapped = t["audit"]["swapped"]["macro_f1"] or 0.0
            micro = t["micro_f1"]["all"]["value"] or 0.0
            scores = (ci(t["jaccard"]), ci(t["macro_f1"]["all"]), f"{micro:.3f}", f"{swapped:.3f}")
            trace = (f"{t['trace'][k]['value']:.3f}" for k in ("trace_answer", "trace_findings"))
            rows.append((m, s, str(t["n"]), *scores, f"{t['parse_failure_rate']:.3f}", *trace))
    for s, t in next(iter(tables.values())).items():
        best_j, best_f = t["constants"]["best_jaccard"], t["constants"]["best_macro_f1"]
        rows.append(
            (
                f"constant: {best_j['policy']}",
                s,
                str(t["n"]),
                ci(best_j["jaccard"]),
                ci(best_j["macro_f1"]),
                "",
                "",
                "",
                "",
                "",
            )
        )
        rows.append(
            (
                f"constant: {best_f['policy']}",
                s,
                str(t["n"]),
                ci(best_f["jaccard"]),
                ci(best_f["macro_f1"]),
                "",
                "",
                "",
                "",
                "",
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    for c in comparisons:
        interval = f"{c['diff']:+.3f} [{c['lo']:+.3f}, {c['hi']:+.3f}]"
        lines.append(f"{c['b']} - {c['a']} on {c['set']}: {c['metric']} {interval} (paired)")
    lines.append(CAVEAT[kind])
    return "\n".join(lines)
