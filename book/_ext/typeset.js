// Formulas to HTML, by MathJax without a browser (typeset.py starts this).
// Input, JSON: {mathjax: its folder, fonts: their address, tex: options,
// formulas: [[TeX, whether displayed], ...]}; output, JSON: {html: [...], css: "..."}.
"use strict";
const asked = JSON.parse(require("fs").readFileSync(0, "utf8"));
require(asked.mathjax + "/node-main.js").init({
  loader: {
    load: ["input/tex-full", "output/chtml", "adaptors/liteDOM", "a11y/assistive-mml"],
    paths: { mathjax: asked.mathjax },
    versionWarnings: false,
  },
  // an undefined macro, or braces that do not match, is an error and no red text
  tex: Object.assign({ packages: { "[-]": ["noerrors", "noundefined"] } }, asked.tex),
  chtml: { fontURL: asked.fonts, adaptiveCSS: true },
  startup: { typeset: false },
}).then((MathJax) => {
  const adaptor = MathJax.startup.adaptor;
  const size = { em: 16, ex: 8, containerWidth: 1280 };
  const html = asked.formulas.map(([tex, display]) =>
    adaptor.outerHTML(MathJax.tex2chtml(tex, Object.assign({ display }, size))));
  const css = adaptor.textContent(MathJax.chtmlStylesheet());
  process.stdout.write(JSON.stringify({ html, css }));
}).catch((error) => {
  console.error(error.stack || error.message || error);
  process.exit(1);
});
