"""Names and code sets of FHIR that our bundles use: those who write a bundle and those who check one share them."""

AI_ASSERTED = {
    "system": "http://terminology.hl7.org/CodeSystem/v3-ObservationValue",
    "code": "AIAST",
    "display": "Artificial Intelligence asserted",
}
# Of the guide AI Transparency on FHIR, 1.0.0-ballot.
CLINICIAN_ASSERTED = {
    "system": "http://hl7.org/fhir/uv/aitransparency/CodeSystem/AddedProvenanceCS",
    "code": "CLINAST_AIRPT",
    "display": "Clinician Asserted from AI Reported",
}
IMAGING = {
    "system": "http://terminology.hl7.org/CodeSystem/observation-category",
    "code": "imaging",
    "display": "Imaging",
}
RADIOLOGY = {
    "system": "http://terminology.hl7.org/CodeSystem/v2-0074",
    "code": "RAD",
    "display": "Radiology",
}
# By how many views were read: LOINC's names.
REPORT_CODES = {
    1: {"system": "http://loinc.org", "code": "36554-4", "display": "XR Chest Single view"},
    2: {"system": "http://loinc.org", "code": "36643-5", "display": "XR Chest 2 Views"},
}
PARTICIPANTS = "http://terminology.hl7.org/CodeSystem/provenance-participant-type"
# Names that only this software gives.
SUBJECT_SYSTEM = "urn:cxr_jax:subject"
READER_SYSTEM = "urn:cxr_jax:reader"
DOCUMENT_SYSTEM = "urn:cxr_jax:cxr_reading"
LONGEST_SUBJECT = 64
