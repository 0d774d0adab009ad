"""Programs as agents: how a command is filled in, started, watched, heard and judged. Linux only.

``template`` fills in the command, ``environment`` and ``folder`` are what the program finds, ``container`` wraps it in
an image; ``process`` runs it under the ``warden``, ``output`` keeps what it prints, ``report`` hears it over HTTP;
``outcome`` is how it ended, ``reward`` what it earned. ``lightning_ray.command_agent`` puts them together.
"""
