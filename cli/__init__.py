"""Every word to a user: options, messages, reports, chat, and the processes of torchrun."""
