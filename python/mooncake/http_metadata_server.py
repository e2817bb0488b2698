"""`python -m mooncake.http_metadata_server`: the same as `mooncake_http_metadata_server`."""

from mooncake._console import http_metadata_server as main

if __name__ == "__main__":
    main()
