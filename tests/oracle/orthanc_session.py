"""Talks to a real Orthanc by our DICOMweb client, in a network of its own: `unshare -n python THIS FOLDER`.

Orthanc listens on all addresses, so it is started where nothing else can reach it. FOLDER holds what is sent:
`film.dcm` by C-STORE, all other .dcm by STOW-RS. A line of JSON says what came of it; the test judges.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pydicom  # noqa: E402
from pynetdicom import AE  # noqa: E402

from cxr_jax.outputs.dicomweb import Client, load_servers  # noqa: E402

PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"
WAIT = 60.0  # seconds until Orthanc answers


def start(folder: Path) -> subprocess.Popen:
    config = {
        "Name": "CXRJAX",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "HttpPort": 18042,
        "DicomPort": 14242,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"room": os.environ["ORTHANC_PASSWORD"]},
        "DicomAlwaysAllowStore": True,
        "DicomCheckCalledAet": False,
        "Plugins": [PLUGIN],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    log = open(folder / "orthanc.log", "wb")
    return subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)


def wait_for(process: subprocess.Popen) -> None:
    end = time.monotonic() + WAIT
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen("http://127.0.0.1:18042/system", timeout=2)
        except urllib.error.HTTPError:
            return  # it wants a password: it is there
        except OSError:
            time.sleep(0.2)
    raise SystemExit("Orthanc does not answer")


def send(dataset: pydicom.Dataset) -> int:
    """C-STORE, as a modality sends a film."""
    entity = AE(ae_title="FILM")
    entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    association = entity.associate("127.0.0.1", 14242)
    status = association.send_c_store(dataset)
    association.release()
    return status.Status


def pixels(data: bytes) -> str:
    return hashlib.sha256(pydicom.dcmread(io.BytesIO(data)).get("PixelData", b"")).hexdigest()


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["ORTHANC_PASSWORD"] = "only-in-this-network"
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    (folder / "storage").mkdir()
    (folder / "pacs.toml").write_text(
        '[servers.orthanc]\nurl = "http://127.0.0.1:18042/dicom-web"\nuser = "room"\n'
        'password_variable = "ORTHANC_PASSWORD"\nmay_store = true\n'
    )
    process = start(folder)
    try:
        wait_for(process)
        client = Client(load_servers(folder / "pacs.toml")["orthanc"])
        film = pydicom.dcmread(folder / "film.dcm")
        names = sorted(path.name for path in folder.glob("*.dcm") if path.name != "film.dcm")
        files = {name: (folder / name).read_bytes() for name in names}
        outcome = {"c_store": send(film)}

        # Found by what a reader asks for, and fetched as it was sent.
        studies = client.search_studies({"PatientID": film.PatientID})
        outcome["studies"] = [study["StudyInstanceUID"] for study in studies]
        outcome["none"] = client.search_studies({"PatientID": "nobody-of-this-name"})
        uids = film.StudyInstanceUID, film.SeriesInstanceUID, film.SOPInstanceUID
        (folder / "back.film.dcm").write_bytes(client.retrieve(*uids))

        # Outputs go there twice, and are there once.
        for _ in range(2):
            stored = client.store(list(files.values()))
            outcome["refused"] = stored.refused
            outcome["stored"] = len(stored.stored)
        instances = client.search_instances(film.StudyInstanceUID)
        outcome["instances"] = sorted(row["Modality"] for row in instances)
        outcome["back"] = {}
        for name, data in files.items():
            header = pydicom.dcmread(io.BytesIO(data))
            got = client.retrieve(
                header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID
            )
            outcome["back"][name] = [pixels(data), pixels(got)]
            (folder / f"back.{name}").write_bytes(got)
        print(json.dumps(outcome))
    finally:
        process.terminate()
        process.wait(20)


if __name__ == "__main__":
    main()
