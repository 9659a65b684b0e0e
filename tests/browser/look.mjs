// Looks at a page in a headless Chromium, as people do: light and dark, wide and narrow, by mouse and keyboard.
//   node look.mjs PAGE.html [FOLDER]   prints one JSON object; screenshots go to FOLDER
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [page_file, folder] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const browser = await puppeteer.launch({
  args: [...chromium.args, "--no-sandbox"], executablePath: await chromium.executablePath(), headless: "shell",
});
const found = { errors: [], requests: [], axe: [], widths: [], ready_ms: [], keyboard: {}, filter: {} };

async function open(width, scheme) {
  const page = await browser.newPage();
  page.on("console", (message) => { if (message.type() === "error") found.errors.push(message.text()); });
  page.on("pageerror", (error) => found.errors.push(String(error)));
  page.on("request", (request) => {
    if (!/^(file|data|blob):/.test(request.url())) found.requests.push(request.url());
  });
  await page.setViewport({ width, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  const began = performance.now();
  await page.goto(pathToFileURL(page_file).href);
  await page.waitForFunction(() => document.body.dataset.ready === "true", { timeout: 20000 });
  found.ready_ms.push(Math.round(performance.now() - began));
  return page;
}

for (const [width, scheme] of [[1400, "light"], [1400, "dark"], [400, "light"], [400, "dark"]]) {
  const page = await open(width, scheme);
  const reach = await page.evaluate(() => document.documentElement.scrollWidth);
  const wide = await page.evaluate((width) => [...document.querySelectorAll("main *")]
    .filter((node) => node.getBoundingClientRect().right > width + 1 && !node.closest(".scroll, pre, .tokens, svg"))
    .map((node) => `${node.tagName}.${node.className}#${node.id}`).slice(0, 3), width);
  found.widths.push([width, reach, wide]);
  await page.evaluate(axe);
  const result = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
  for (const one of result.violations)
    found.axe.push({ id: one.id, impact: one.impact, width, scheme, n: one.nodes.length,
      first: one.nodes[0].html.slice(0, 200), why: one.nodes[0].failureSummary.slice(0, 300) });
  if (folder) {
    await page.screenshot({ path: `${folder}/page-${width}-${scheme}.png`, fullPage: true });
    const credit = await page.$("#credit-view");
    if (credit) await credit.screenshot({ path: `${folder}/credit-${width}-${scheme}.png` });
  }
  await page.close();
}

const page = await open(1400, "light");
if (await page.$("#tokens")) {
  const text = (selector) => page.$eval(selector, (node) => node.textContent);
  await page.focus("#tenth");
  const last = await text("#tenth-label");
  await page.keyboard.press("Home");
  found.keyboard.tenths = [await text("#tenth-label"), last];
  await page.focus("#tokens");
  await page.keyboard.press("Home");
  const first = await text("#numbers");
  await page.keyboard.press("ArrowRight");
  found.keyboard.numbers = [first, await text("#numbers")];
  await page.keyboard.press("ArrowDown");
  found.keyboard.below = await text("#numbers");
  found.keyboard.active = await page.$eval("#tokens", (node) => node.getAttribute("aria-activedescendant"));
  found.keyboard.blamed = await page.$$eval(".tok.blamed", (nodes) => nodes.map((node) => node.textContent.trim()));
  found.keyboard.named = await page.$$eval(".row.named", (nodes) => nodes.map((node) => node.textContent));
  await page.focus("#tenth");
  await page.keyboard.press("End");
  await page.focus("#follow");
  await page.keyboard.press("Space");
  await page.focus("#tenth");
  await page.keyboard.press("Home");
  found.keyboard.shared = await page.$$eval(".tok.shared", (nodes) => nodes.map((node) => node.textContent).join(""));
}
if (await page.$("#all")) {
  const count = () => page.$eval("#f-count", (node) => node.textContent);
  found.filter.all = await count();
  await page.focus("#f-text");
  const began = performance.now();
  await page.keyboard.type("fit");
  found.filter.text = await count();
  found.filter.ms = Math.round(performance.now() - began);
  await page.focus("#all tbody button");
  await page.keyboard.press("Enter");
  found.filter.opened = await page.$$eval("#all pre", (nodes) => nodes.map((node) => node.textContent));
}
await page.close();
await browser.close();
console.log(JSON.stringify(found));
