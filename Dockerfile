# etpo on a CPU: docker build -t etpo . && docker run --rm -v "$PWD/runs:/runs" etpo train --dataset tic-tac-toe
FROM python:3.12-slim
WORKDIR /opt/etpo
COPY . .
RUN python -m pip install --no-cache-dir -c constraints.txt . && useradd --create-home trainer && mkdir /runs \
    && chown trainer /runs
USER trainer
WORKDIR /
ENTRYPOINT ["etpo"]
CMD ["--help"]
