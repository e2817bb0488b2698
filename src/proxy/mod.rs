//! The OpenAI-compatible front for prefill and decode groups (XpYd). Empty so far: there is no subcommand for it either.
