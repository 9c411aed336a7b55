"""The one exception a user can cause and the command line turns into a sentence."""


class LayerLoomError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence: what is wrong, what was expected, what to do.
    It is raised before any work starts; the command line prints it and exits with 2.
    """
