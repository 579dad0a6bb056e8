"""What a reader agrees to before a thought is kept; without it nothing is stored."""

import hashlib

VERSION = 1
TEXT = (
    "What I say and type here, and how I correct it, is kept on this machine with my pseudonym and the film that I "
    "look at. It may be used to train models that read chest radiographs, and my voice is not used for anything else. "
    "I name no patient, and nobody else. I can have a recording and its texts erased at any time; what was exported or "
    "trained before that is not called back, and hashes of what was erased stay in the record."
)
SHA256 = hashlib.sha256(f"{VERSION}\n{TEXT}".encode()).hexdigest()
