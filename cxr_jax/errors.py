"""The one error that means "your input is wrong": printed as one line, exit code 2."""


class UserError(Exception):
    """Bad usage or bad input. The message is one line that names the file or flag and the reason.

    It must never hold a DICOM header value: patient data does not reach a log.
    """


def bad_usage(message: str):
    """An `argparse.ArgumentParser.error` that is one line, like every other error."""
    raise UserError(message)
