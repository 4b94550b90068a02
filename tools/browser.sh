#!/bin/sh
# The site's test drives Chromium. Where it is missing and we may, install Debian's; otherwise that test skips and says why.
for b in chromium chromium-browser google-chrome; do command -v $b >/dev/null 2>&1 && exit 0; done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    printf '\n== installing chromium and a Chinese font, for the test of the site\n'
    opt="-o Acquire::Retries=1 -o Acquire::http::Timeout=20 -qq"
    { apt-get $opt update && DEBIAN_FRONTEND=noninteractive apt-get $opt install -y --no-install-recommends chromium fonts-noto-cjk; } >/dev/null 2>&1 \
        || echo "   could not install it: the test of the site in a browser will be skipped"
else
    echo "== no Chromium here: the test of the site in a browser will be skipped"
fi
exit 0
