"""Rows of both published formats, and manifests of them."""

import json

PROMPT = "Find abnormalities and support devices."


def grpo(image="a.png", solution="Edema", **extra):
    talk = [{"from": "human", "value": PROMPT}]
    return {"id": image, "image": image, "conversations": talk, "solution": solution} | extra


TARGET = "<think>Clear.</think><answer>No Finding</answer>"


def sft(image="b.png", solution="No Finding", text=TARGET, **extra):
    user = [{"type": "image", "image": image}, {"type": "text", "text": PROMPT}]
    turns = [("user", user), ("assistant", [{"type": "text", "text": text}])]
    row = {"id": image, "image": image, "subject_id": 7, "study_id": 9, "solution": solution}
    return (
        row | {"messages": [{"role": role, "content": content} for role, content in turns]} | extra
    )


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows)
    )
    return path
