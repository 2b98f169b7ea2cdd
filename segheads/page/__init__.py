"""The page of `segheads demo`: what people may change (`controls`), what is shown (`views`), `layout` and `server`."""
