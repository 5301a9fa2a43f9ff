"""The HTTP side of the server (extra `serve`): what goes over the wire, who may ask, the page. `app` puts it together."""
