"""What the double answers where it does not do what it was asked: as the real server words it, for kubectl to print."""

from typing import Any

Document = dict[str, Any]


class Refused(Exception):
    """An answer that is no success: a code, a reason in one word, and a sentence."""

    def __init__(self, code: int, reason: str, message: str, details: Document | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.details = code, reason, details

    def status(self) -> Document:
        """The answer's body."""
        body: Document = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        body |= {"message": str(self), "reason": self.reason, "code": self.code}
        return body | ({"details": self.details} if self.details else {})


def not_found(resource: str, name: str) -> Refused:
    """There is no such object; `resource` is as in `jobs.batch`."""
    plural, _, group = resource.partition(".")
    return Refused(
        404,
        "NotFound",
        f'{resource} "{name}" not found',
        {"name": name, "kind": plural} | ({"group": group} if group else {}),
    )


def already_exists(resource: str, name: str) -> Refused:
    """There is one of that name."""
    plural, _, group = resource.partition(".")
    return Refused(
        409, "AlreadyExists", f'{resource} "{name}" already exists', {"name": name, "group": group, "kind": plural}
    )


def conflict(resource: str, name: str, why: str) -> Refused:
    """The object is not the one that the caller saw."""
    plural, _, group = resource.partition(".")
    return Refused(
        409,
        "Conflict",
        f'Operation cannot be fulfilled on {resource} "{name}": {why}',
        {"name": name, "group": group, "kind": plural},
    )


def modified(resource: str, name: str) -> Refused:
    """Somebody else changed it in between."""
    return conflict(
        resource, name, "the object has been modified; please apply your changes to the latest version and try again"
    )


def bad_request(message: str) -> Refused:
    """What was sent cannot be read as what it says it is."""
    return Refused(400, "BadRequest", message)


def forbidden(resource: str, name: str, why: str) -> Refused:
    """Admission says no."""
    plural, _, group = resource.partition(".")
    return Refused(
        403, "Forbidden", f'{resource} "{name}" is forbidden: {why}', {"name": name, "group": group, "kind": plural}
    )


def invalid(kind: str, group: str, name: str, causes: list[Document]) -> Refused:
    """It can be read, and breaks a rule: each cause has `field`, `message` and `reason`."""
    said = [f"{each['field']}: {each['message']}" for each in causes]
    what = f"{kind}.{group}" if group else kind
    return Refused(
        422,
        "Invalid",
        f'{what} "{name}" is invalid: {said[0] if len(said) == 1 else "[" + ", ".join(said) + "]"}',
        {"name": name, "group": group, "kind": kind, "causes": causes},
    )


def cause(field: str, message: str, reason: str = "FieldValueInvalid") -> Document:
    """One broken rule."""
    return {"reason": reason, "message": message, "field": field}
