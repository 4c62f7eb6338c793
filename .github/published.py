"""Turn `_config.yml` into that of a published site, in place: only in a checkout to be thrown away.

What a copy on a disk has no use for comes from the workflow's environment: the address of the site
(canonical links, sitemap, cards of links that are shared), the repository and its buttons.

    SITE_URL            https://owner.github.io/name/
    GITHUB_SERVER_URL, GITHUB_REPOSITORY, GITHUB_REF_NAME    set in every workflow
"""

import os
from pathlib import Path

import yaml

CONFIG = Path(__file__).resolve().parents[1] / "_config.yml"


def published(config: dict, environ: dict) -> dict:
    """The configuration with addresses, buttons, sitemap and cards added."""
    site = environ["SITE_URL"].rstrip("/") + "/"
    pull_request = environ.get("GITHUB_REF_NAME", "main").endswith("/merge")
    config["repository"] = {
        "url": f"{environ['GITHUB_SERVER_URL']}/{environ['GITHUB_REPOSITORY']}",
        "path_to_book": "book",
        "branch": "main" if pull_request else environ["GITHUB_REF_NAME"],
    }
    # Colab is left out until chapters install what they import there.
    config["launch_buttons"] = {"binderhub_url": "https://mybinder.org"}
    config["html"] |= {
        "baseurl": site,
        "use_repository_button": True,
        "use_issues_button": True,
        "use_edit_page_button": True,
    }
    sphinx = config["sphinx"]["config"]
    sphinx["extensions"] += ["sphinx_sitemap", "sphinxext.opengraph"]
    sphinx |= {
        "sitemap_url_scheme": "{link}",
        "sitemap_excludes": ["search.html", "genindex.html"],
        "ogp_site_url": site,
        "ogp_site_name": config["title"],
        "ogp_image": f"{site}_static/representation.png",
        "ogp_description_length": 200,
        "ogp_enable_meta_description": True,
        "ogp_social_cards": {"enable": False},
    }
    return config


if __name__ == "__main__":
    config = published(yaml.safe_load(CONFIG.read_text()), dict(os.environ))
    CONFIG.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
