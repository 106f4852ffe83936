// What a link leads to, in a box beside it, while pointer or focus rests on the link
// (previews.py writes the texts, which are loaded with the first of them).
(function () {
  "use strict";
  const WAIT = 250; // ms: a pointer that passes over a link opens nothing
  const root = new URL(document.documentElement.dataset.content_root || "./", document.baseURI);
  let box = null, link = null, timer = 0, loading = null;

  function load() {
    loading = loading || new Promise((done) => {
      const script = document.createElement("script");
      script.src = new URL("_static/preview-texts.js", root).href;
      script.onload = script.onerror = () => done(window.cratePreviews || {});
      document.head.append(script);
    });
    return loading;
  }

  function key(anchor) {
    const address = new URL(anchor.href);
    if (!address.hash || !address.href.startsWith(root.href)) return null;
    return address.href.slice(root.href.length).split("#")[0] + address.hash;
  }

  function close() {
    clearTimeout(timer);
    if (box) box.remove();
    if (link) link.removeAttribute("aria-describedby");
    box = link = null;
  }

  function place() {
    const at = link.getBoundingClientRect();
    const wide = document.documentElement.clientWidth, high = window.innerHeight;
    const left = Math.max(8, Math.min(at.left, wide - box.offsetWidth - 8));
    const below = at.bottom + 8 + box.offsetHeight <= high || at.top < high / 2;
    box.style.left = `${left}px`;
    box.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - 8 - box.offsetHeight)}px`;
  }

  function open(anchor) {
    const named = key(anchor);
    if (named === null) return;
    load().then((texts) => {
      if (link !== anchor || !Object.hasOwn(texts, named)) return;
      box = document.createElement("div");
      box.className = "link-preview bd-article";
      box.id = "link-preview";
      box.setAttribute("role", "tooltip");
      box.innerHTML = texts[named];
      document.body.append(box);
      anchor.setAttribute("aria-describedby", box.id);
      place();
    });
  }

  function rest(event) {
    const anchor = event.target instanceof Element
      && event.target.closest("article.bd-article a[href*='#']:not(.headerlink, .claim-link)");
    if (!anchor || anchor === link || event.pointerType === "touch") return;
    close();
    link = anchor;
    timer = setTimeout(open, event.type === "focusin" ? 0 : WAIT, anchor);
  }

  function leave(event) {
    if (link && !link.contains(event.relatedTarget)) close();
  }

  document.addEventListener("pointerover", rest);
  document.addEventListener("focusin", rest);
  document.addEventListener("pointerout", leave);
  document.addEventListener("focusout", leave);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
  document.addEventListener("scroll", close, { passive: true });
  document.addEventListener("click", close);
})();
