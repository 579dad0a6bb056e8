"""What becomes of a reading: one JSON document, and what other systems take (DICOM SR, secondary capture, FHIR)."""
